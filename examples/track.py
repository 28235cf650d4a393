"""The edge of stability: lambda_max rises to 2 / eta along gradient descent, and stays.

Full-batch gradient descent on a small tanh network and 500 of the scikit-learn digits,
with the squared error, as in Cohen et al. (2021, arXiv:2103.00065). Writes a figure.
"""

import sys

import torch

import sharpness as sh
from sharpness.lab import data

LEARNING_RATE = 0.4


def track(num_updates: int, every: int) -> sh.SharpnessTracker:
    """Train, and measure on the same samples."""
    x, y = (part[:500] for part in data.load("digits").train)
    targets = torch.nn.functional.one_hot(y, 10).float()
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(64, 64),
        torch.nn.Tanh(),
        torch.nn.Linear(64, 64),
        torch.nn.Tanh(),
        torch.nn.Linear(64, 10),
    )
    loss = torch.nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    tracker = sh.SharpnessTracker(
        model, loss, (x, targets), optimizer=optimizer, every=every
    )
    for _ in range(num_updates):
        optimizer.zero_grad()
        loss(model(x), targets).backward()
        optimizer.step()
        tracker.step()
    return tracker


if __name__ == "__main__":
    tracker = track(num_updates=4000, every=50)
    print(tracker.table())
    print(tracker)
    tracker.plot(sys.argv[1] if len(sys.argv) > 1 else "edge_of_stability.png")
