"""Risks whose curvature and box maximum are known without the library's help."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from sharpness.risk.empirical import EmpiricalRisk

ONE_SAMPLE = [torch.zeros(1)]  # a closure's batch with a single loss term


class Point(nn.Module):
    """A model that is nothing but its parameters."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.clone())


def quadratic(
    h: Tensor | Sequence[float],
    centre: Tensor | None = None,
    *,
    at: Tensor | None = None,
    offset: float = 0.0,
) -> EmpiricalRisk:
    """offset + 1/2 sum h_i (theta_i - c_i)^2, held at `at`: by default the centre."""
    h = torch.as_tensor(h, dtype=torch.float64) if not isinstance(h, Tensor) else h
    c = torch.zeros_like(h) if centre is None else centre.to(h)
    return EmpiricalRisk(
        Point(c if at is None else at.to(h)),
        closure=lambda model, _: offset + 0.5 * (h * (model.theta - c).square()).sum(),
        data=ONE_SAMPLE,
    )


def prescribed_hessian(matrix: Tensor, *, scale: float = 1.0) -> EmpiricalRisk:
    """A risk that is no quadratic, with a Hessian of exactly `scale * matrix`."""
    here = torch.linspace(-1, 1, len(matrix)).to(matrix)

    def closure(model: nn.Module, _: Tensor) -> Tensor:
        d = model.theta - here
        return scale * (0.5 * d @ (matrix @ d) + d.sum() + (d**3 + d**4).sum() / 6)

    return EmpiricalRisk(Point(here), closure=closure, data=ONE_SAMPLE)


def symmetric(
    spectrum: Tensor | Sequence[float], seed: int = 0, dtype: torch.dtype | None = None
) -> Tensor:
    """A dense symmetric matrix with this spectrum and random eigenvectors."""
    values = torch.as_tensor(spectrum, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn(
        (len(values), len(values)), generator=generator, dtype=torch.float64
    )
    q = torch.linalg.qr(gauss).Q
    matrix = q * values @ q.T
    return ((matrix + matrix.T) / 2).to(dtype or torch.float64)


def with_products(matrix: Tensor) -> EmpiricalRisk:
    """A risk whose products are plain `matrix @ v`: fast, for many runs."""
    risk = quadratic(torch.ones(len(matrix), dtype=matrix.dtype))
    risk.product = lambda v, matrix_name="hessian": matrix @ v
    return risk


class Tanh(nn.Module):
    """Two layers and a tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6, dtype=torch.float64)
        self.last = nn.Linear(6, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def mlp_data(num_samples: int = 40) -> tuple[Tensor, Tensor]:
    """Three noisy classes in three dimensions."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(num_samples) % 3
    x = torch.randn((num_samples, 3), generator=generator, dtype=torch.float64)
    return x + 1.2 * torch.eye(3, dtype=torch.float64)[y], y


def trained_mlp(num_steps: int = 150, seed: int = 0) -> Tanh:
    """A `Tanh` network after some steps of gradient descent on `mlp_data`."""
    return deepcopy(_trained_once(num_steps, seed))


@cache
def _trained_once(num_steps: int, seed: int) -> Tanh:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Tanh()
    x, y = mlp_data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(num_steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model


def mlp_risk(num_steps: int = 150, seed: int = 0) -> EmpiricalRisk:
    """The mean cross-entropy of `trained_mlp` on `mlp_data`; not convex."""
    return EmpiricalRisk(trained_mlp(num_steps, seed), nn.CrossEntropyLoss(), mlp_data())


def second_minimum() -> Tensor:
    """The parameters (n,) of another training run."""
    return mlp_risk(300, seed=3).theta


def by_hand(theta: np.ndarray, num_samples: int = 40) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of a `Tanh` network on `mlp_data`, in NumPy."""
    x, y = (part.numpy() for part in mlp_data(num_samples))
    w1, b1, w2, b2 = np.split(theta, [18, 24, 42])
    logits = np.tanh(x @ w1.reshape(6, 3).T + b1) @ w2.reshape(3, 6).T + b2
    chosen = logits[np.arange(len(y)), y]
    value = np.mean(np.log(np.exp(logits).sum(1)) - chosen)
    return float(value), float(np.mean(logits.argmax(1) == y))


def mlp_hessian(theta: Tensor) -> Tensor:
    """The dense Hessian (n, n) of `mlp_risk`, from the formula written out again."""
    x, y = mlp_data()

    def value(theta: Tensor) -> Tensor:
        w1, b1, w2, b2 = theta.split([18, 6, 18, 3])
        logits = torch.tanh(x @ w1.view(6, 3).T + b1) @ w2.view(3, 6).T + b2
        return (logits.logsumexp(1) - logits[torch.arange(len(y)), y]).mean()

    return torch.autograd.functional.hessian(value, theta)


def random_spectrum(case: int) -> np.ndarray:
    """Eigenvalues of a random problem: the kind goes round with `case`."""
    rng = np.random.default_rng(case)
    n = int(rng.integers(2, 41))
    normal = rng.normal(size=n)
    match case % 6:
        case 0:
            return normal
        case 1:  # clusters, from rounding up to a hundredth wide
            centres = rng.normal(size=max(1, n // 4))
            width = 10.0 ** rng.uniform(-15, -2)
            return rng.choice(centres, n) + width * normal
        case 2:
            return 1e-8 * np.exp(2 * normal)
        case 3:
            return 1e8 * normal
        case 4:  # every value twice
            return np.repeat(normal, 2)[:n]
        case _:  # negative definite, over many orders of magnitude
            return -np.exp(3 * normal)
