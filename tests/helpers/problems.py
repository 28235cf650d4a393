"""Problems with known answers. The oracles share no code with the library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sharpness import EmpiricalRisk

ONE_SAMPLE = [torch.zeros(1)]  # a closure's batch with a single loss term
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model, a loss and data; `f` is its mean loss written out by hand."""

    model: nn.Module
    loss: Callable[..., Tensor]
    data: tuple[Tensor, Tensor]
    f: Function  # of the flat parameters (n,)
    hessian: Tensor | None = None  # (n, n), where a closed form is known

    def risk(self, **settings: Any) -> EmpiricalRisk:
        return EmpiricalRisk(self.model, self.loss, self.data, **settings)

    @property
    def theta(self) -> Tensor:
        return flat(self.model)


class Point(nn.Module):
    """A model that is nothing but its parameters."""

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(theta.clone())


def linear_regression(num_samples: int = 23, num_features: int = 5) -> Problem:
    """Least squares with one output: the Hessian is 2/N X^T X."""
    draw = generator(1)
    x, y = normal(draw, num_samples, num_features), normal(draw, num_samples, 1)
    return Problem(
        model=filled(nn.Linear(num_features, 1, bias=False, dtype=torch.float64), draw),
        loss=nn.MSELoss(),
        data=(x, y),
        f=lambda theta: ((x @ theta - y[:, 0]) ** 2).sum() / num_samples,
        hessian=2 / num_samples * x.T @ x,
    )


def softmax_regression(
    num_samples: int = 23, num_features: int = 3, num_classes: int = 4
) -> Problem:
    """A linear layer under the mean cross-entropy."""
    draw = generator(2)
    x = normal(draw, num_samples, num_features)
    y = torch.randint(num_classes, (num_samples,), generator=draw)
    model = filled(nn.Linear(num_features, num_classes, dtype=torch.float64), draw)
    outer = num_classes * num_features

    def f(theta: Tensor) -> Tensor:
        w, b = theta[:outer].view(num_classes, num_features), theta[outer:]
        return cross_entropy(x @ w.T + b, y)

    equal = torch.ones(num_samples, dtype=torch.float64)
    return Problem(
        model=model,
        loss=nn.CrossEntropyLoss(),
        data=(x, y),
        f=f,
        hessian=softmax_hessian(model, x, equal),
    )


def softmax_hessian(model: nn.Linear, x: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i J_i^T (diag(p_i) - p_i p_i^T) J_i / sum_i w_i, J_i = d logits / d theta.

    Also for class weights and ignored targets: w_i is what sample i counts.
    """
    p = torch.softmax(model(x).detach(), 1)
    eye = torch.eye(p.shape[1], dtype=x.dtype)
    total = 0 * torch.outer(flat(model), flat(model))
    for i in range(len(x)):
        jacobian = torch.cat([torch.kron(eye, x[i : i + 1]), eye], 1)
        inner = torch.diag(p[i]) - torch.outer(p[i], p[i])
        total += weights[i] * jacobian.T @ inner @ jacobian
    return total / weights.sum()


def tiny_mlp(
    *,
    batchnorm: bool = False,
    dtype: torch.dtype = torch.float64,
    num_samples: int = 23,
) -> Problem:
    """Linear(3, 5), BatchNorm where asked, tanh, Linear(5, 4), mean cross-entropy.

    The running averages of BatchNorm differ from the statistics of the data.
    """
    draw = generator(3)
    middle = [nn.BatchNorm1d(5)] if batchnorm else []
    layers = nn.Sequential(nn.Linear(3, 5), *middle, nn.Tanh(), nn.Linear(5, 4))
    model = filled(layers.double(), draw).to(dtype)
    for norm in model[1:2] if batchnorm else []:
        norm.running_mean.copy_(normal(draw, 5))
        norm.running_var.copy_(1 + normal(draw, 5) ** 2)
    x = normal(draw, num_samples, 3).to(dtype)
    y = torch.randint(4, (num_samples,), generator=draw)
    f = mlp_by_hand(model, x, y)
    return Problem(model=model, loss=nn.CrossEntropyLoss(), data=(x, y), f=f)


def mlp_by_hand(
    model: nn.Sequential, x: Tensor, y: Tensor, *, statistics: str = "running"
) -> Function:
    """The mean loss of a `tiny_mlp` on (x, y) as a function of its flat parameters."""
    norm = model[1] if len(model) == 4 else None
    sizes = [15, 5, *([5, 5] if norm else []), 20, 4]

    def f(theta: Tensor) -> Tensor:
        w1, b1, *affine, w2, b2 = theta.split(sizes)
        z = x @ w1.view(5, 3).T + b1
        if norm:
            mean, var = norm.running_mean, norm.running_var
            if statistics == "batch":
                mean = z.sum(0) / len(z)
                var = ((z - mean) ** 2).sum(0) / len(z)
            z = (z - mean) / (var + norm.eps).sqrt() * affine[0] + affine[1]
        return cross_entropy(torch.tanh(z) @ w2.view(4, 5).T + b2, y)

    return f


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """The mean of -log softmax(logits)[y]."""
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    return -log_p[torch.arange(len(y)), y].sum() / len(y)


def flat(model: nn.Module) -> Tensor:
    """A copy of all parameters (n,), in `named_parameters()` order."""
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def filled(model: nn.Module, draw: torch.Generator) -> nn.Module:
    """The model with parameters N(0, 1/4) from a generator of its own."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(normal(draw, *p.shape) / 2)
    return model


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def directions(num: int, n: int, seed: int = 7) -> Tensor:
    """Random directions (num, n)."""
    return normal(generator(seed), num, n)


def hessian_of(f: Function) -> Function:
    """theta -> dense Hessian (n, n), by PyTorch's function transforms."""
    return torch.func.jacrev(torch.func.grad(f))


def differenced_hvp(gradient: Function, theta: Tensor, v: Tensor) -> Tensor:
    """H v from four gradients: central differences of fourth order."""
    h = torch.finfo(theta.dtype).eps ** 0.2 / v.norm()
    g = [gradient(theta + step * h * v) for step in (-2, -1, 1, 2)]
    return (g[0] - 8 * g[1] + 8 * g[2] - g[3]) / (12 * h)


def assert_near(actual: Tensor, expected: Tensor, rtol: float) -> None:
    """Shape, type, and ||actual - expected|| <= rtol ||expected||."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    distance = (actual - expected).norm() / expected.norm()
    assert distance <= rtol, f"relative distance {float(distance):.1e} > {rtol:.1e}"


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


def prescribed_hessian(
    matrix: Tensor, *, scale: float = 1.0, slope: float = 1.0
) -> EmpiricalRisk:
    """A risk that is no quadratic, with a Hessian of exactly `scale * matrix`."""
    here = torch.linspace(-1, 1, len(matrix)).to(matrix)

    def closure(model: nn.Module, _: Tensor) -> Tensor:
        d = model.theta - here
        return scale * (0.5 * d @ (matrix @ d) + slope * d.sum() + (d**3 + d**4).sum())

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


class Pole(nn.Sequential):
    """Layers whose outputs have a pole where the first input is 9."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (x[:, :1] - 9.0)


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
