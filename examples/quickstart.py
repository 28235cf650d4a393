"""Ten lines from data to numbers: train a small network, measure its minimum."""

import torch

import sharpness as sh
from sharpness.lab import data

digits = data.load("digits")
x, y = digits.train

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Flatten(), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(60):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()

risk = sh.EmpiricalRisk(model, torch.nn.CrossEntropyLoss(), (x, y))
print(f"loss {risk.value():.4f}, accuracy {risk.accuracy():.1%}")
print(sh.eigenpairs(risk, k=5))
print(sh.epsilon_sharpness(risk, epsilon=1e-3))
