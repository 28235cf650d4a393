"""Problems whose training is known: linear regression, and a quadratic with noise."""

import numpy as np
import torch
from torch import nn

from sharpness.batchsize.problem import Problem


def regression(num_rows=256, num_features=3, noise=0.1, **settings):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(num_rows, num_features, generator=draw)
    y = x.sum(1, keepdim=True) + noise * torch.randn(num_rows, 1, generator=draw)
    settings = {"lr": 0.05, "batch_size": 8, "data": (x, y), **settings}
    model = nn.utils.skip_init(nn.Linear, num_features, 1)  # draws nothing
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    return Problem(settings.pop("model", model), "mse", **settings)


class Quadratic(nn.Module):
    """Mean squared outputs sqrt(h) (theta - x): loss mean_j h_j (theta_j - x_j)^2."""

    def __init__(self, curvature, start):
        super().__init__()
        self.register_buffer("root", torch.as_tensor(curvature).sqrt())
        self.theta = nn.Parameter(torch.full_like(self.root, start))

    def forward(self, x):
        return self.root * (self.theta - x)


CURVATURE, START, NOISE = np.geomspace(0.02, 1, 40).astype(np.float32), 1.0, 1.0


def noisy_quadratic(num_rows=4096, **settings):
    """Rows x ~ N(0, NOISE^2) whose mean is 0 and whose variance is NOISE^2 exactly."""
    x = torch.randn(num_rows, len(CURVATURE), generator=torch.Generator().manual_seed(1))
    x = NOISE * (x - x.mean(0)) / x.std(0, correction=0)
    model = Quadratic(CURVATURE, START)
    return Problem(model, "mse", (x, torch.zeros_like(x)), **settings)


def expected_updates(batch_size, rates, target, most=20_000):
    """Updates until the expected loss meets the target, at the best of these rates."""
    return min(_expected(batch_size, rate, target, most) for rate in rates)


def _expected(batch_size, lr, target, most):
    h = np.array(CURVATURE)
    step = 2 * lr * h / len(h)
    square = np.full(len(h), START**2)  # E theta_j^2
    last = np.mean(h * (square + NOISE**2))
    for made in range(1, most):
        square = (1 - step) ** 2 * square + step**2 * NOISE**2 / batch_size
        loss = np.mean(h * (square + NOISE**2))
        if loss <= target:
            return made - 1 + (last - target) / (last - loss)
        if not loss < last:
            return np.inf
        last = loss
    return np.inf
