"""Are the k values that `eigenpairs` reports the k largest, and for how many products?

    python benchmarks/certificate.py [--spectra 1000] [--networks 10] [--starts 10]

Random spectra and small trained networks, with the certificate (`confidence=.95`) and by
the rule without one (`confidence=None`), from the same starts in float32 and float64. What
is true comes from the spectrum itself, or from `method="dense"` in float64. Right is what
docs/concepts/spectra.md claims: the k-th of the values that count as distinct is at most
(1 + tol) times the k-th reported one, and those above that lie within tol of a reported
one. The product that verifies the leading pair is not counted. Four minutes on one core.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

import sharpness
from sharpness.krylov.eigenpair_search import Search
from sharpness.lab import data

TOL, CONFIDENCE = 1e-2, 0.95
Draw = Callable[[np.random.Generator, int], np.ndarray]
Multiply = Callable[[Tensor], Tensor]


# -- spectra ---------------------------------------------------------------------------


def outliers(draw: np.random.Generator, n: int) -> np.ndarray:
    """A dozen values out of a bulk, as in trained networks."""
    bulk = 0.05 * draw.random(n - 12) ** 8 - 0.005
    return np.append(0.2 + 0.8 * draw.random(12), bulk)


def clusters(draw: np.random.Generator, n: int) -> np.ndarray:
    """Eight values within 3 to 30 % of each other."""
    width = draw.uniform(0.03, 0.3)
    return np.append(1 + width * draw.random(8), 0.3 * draw.random(n - 8) ** 4)


def repeats(draw: np.random.Generator, n: int) -> np.ndarray:
    """Two to five copies of each of six values, and a bulk."""
    copies = draw.integers(2, 6, 6)
    top = np.repeat(0.2 + 0.8 * draw.random(6), copies)
    return np.append(top, 0.05 * draw.random(n - len(top)) ** 4)


def both_signs(draw: np.random.Generator, n: int) -> np.ndarray:
    """Outliers at both ends of a bulk around zero."""
    ends = (0.2 + 0.8 * draw.random(16)) * draw.choice([-1, 1], 16)
    return np.append(ends, 0.1 * draw.uniform(-1, 1, n - 16) ** 3)


def power_law(draw: np.random.Generator, n: int) -> np.ndarray:
    """No gap between what is large and what is not."""
    return (1.0 + np.arange(n)) ** -draw.uniform(0.5, 2)


def tiny(draw: np.random.Generator, n: int) -> np.ndarray:
    """Outliers of size 1e-30."""
    return 1e-30 * outliers(draw, n)


def huge(draw: np.random.Generator, n: int) -> np.ndarray:
    """Outliers of size 1e30."""
    return 1e30 * outliers(draw, n)


FAMILIES: tuple[Draw, ...] = (
    outliers,
    clusters,
    repeats,
    both_signs,
    power_law,
    tiny,
    huge,
)


# -- what is right -----------------------------------------------------------------------


def distinct(values: np.ndarray, k: int, which: str) -> list[float]:
    """c_1, ..., c_k: each the next one that no window of `TOL` holds with one before."""
    score = {"LA": np.positive, "SA": np.negative, "LM": np.abs}[which]
    chosen: list[float] = []
    for x in values[np.argsort(-score(values), kind="stable")].tolist():
        least = [abs(c) * (1 - TOL) / (1 + TOL) for c in chosen if c * x > 0]
        most = [abs(c) * (1 + TOL) / (1 - TOL) for c in chosen if c * x > 0]
        if not any(a <= abs(x) <= b for a, b in zip(least, most, strict=True)):
            chosen.append(x)
        if len(chosen) == k:
            break
    return chosen


def is_right(found: np.ndarray, truth: np.ndarray, which: str) -> bool:
    """Whether the theorem's statement holds; "BE" at both ends."""
    if which == "BE":
        at_top = -(-len(found) // 2)
        top = is_right(found[:at_top], truth, "LA")
        return top and is_right(found[at_top:], truth, "SA")
    score = {"LA": np.positive, "SA": np.negative, "LM": np.abs}[which]
    allowed = TOL * np.abs(found) * (1 + 1e-5)  # rounding
    last = int(np.argmin(score(found)))
    reach = score(found)[last] + allowed[last]
    above = [c for c in distinct(truth, len(found), which) if score(np.array(c)) > reach]
    covered = all((np.abs(found - c) <= allowed).any() for c in above)
    return covered and len(above) < len(found)


# -- runs ----------------------------------------------------------------------------------


@dataclass
class Count:
    """Runs of one rule in one family."""

    products: list[int]
    converged: int = 0
    right: int = 0  # of those that converged

    def row(self) -> list[str]:
        num = len(self.products)
        share = self.right / self.converged if self.converged else float("nan")
        mean = sum(self.products) / num
        return [
            f"{100 * share:.1f} %",
            f"{100 * self.converged / num:.1f} %",
            f"{median(self.products):g} ({mean:.1f})",
        ]


def searched(
    multiply: Multiply, start: Tensor, *, k: int, which: str, certified: bool, seed: int
) -> tuple[np.ndarray, int, bool]:
    """Values, products, whether it converged within the default budget."""
    most = 100 + 10 * k
    search = Search(
        start,
        torch.Generator().manual_seed(seed),
        k=k,
        which=which,
        tol=TOL,
        miss=(1 - CONFIDENCE) / k if certified else None,
        basis_size=min(len(start), most),
    )
    while not search.is_converged and search.num_products < most:
        search.absorb(multiply(search.direction()))
    converged, products = search.is_converged, search.num_products
    return search.found().values, products, converged


def compare(
    counts: dict[bool, Count],
    multiply: Multiply,
    truth: np.ndarray,
    start: Tensor,
    **run: object,
) -> None:
    """Both rules from the same start."""
    for certified, count in counts.items():
        values, products, converged = searched(multiply, start, certified=certified, **run)
        count.products.append(products)
        count.converged += converged
        count.right += converged and is_right(values, truth, run["which"])


def both_rules() -> dict[bool, Count]:
    return {False: Count([]), True: Count([])}


def of_spectra(family: Draw, k: int, which: str, num: int) -> dict[bool, Count]:
    counts = both_rules()
    for seed in range(num):
        draw = np.random.default_rng([seed, FAMILIES.index(family)])
        spectrum = family(draw, int(draw.integers(500, 3000)))
        diagonal = torch.from_numpy(spectrum).to((torch.float32, torch.float64)[seed % 2])
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(len(spectrum), generator=generator).to(diagonal)
        truth = diagonal.double().numpy()
        multiply = lambda v, d=diagonal: d * v  # noqa: E731
        compare(counts, multiply, truth, start, k=k, which=which, seed=seed)
    return counts


# -- networks ------------------------------------------------------------------------------


def trained(i: int) -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    """A small network on the digits, its loss, and what it was trained on; ten kinds."""
    x, y = (part[:1000] for part in data.load("digits").train)
    torch.manual_seed(i)
    activation = (nn.Tanh, nn.ReLU, nn.GELU)[i % 3]
    if i % 5 == 4:
        layers = [nn.Conv2d(1, 6, 3), activation(), nn.Conv2d(6, 8, 3, 2), activation()]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 10))
    else:
        layers = [nn.Linear(64, 14), activation(), nn.Linear(14, 14), activation()]
        model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(14, 10))
    loss: nn.Module = nn.CrossEntropyLoss()
    if i % 4 == 3:
        loss, y = nn.MSELoss(), nn.functional.one_hot(y, 10).float()
    batch, optimizer = (16, 500)[i % 2], torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range((10, 100)[i % 2]):
        for index in torch.randperm(len(x)).split(batch):
            optimizer.zero_grad()
            loss(model(x[index]), y[index]).backward()
            optimizer.step()
    return model.eval(), loss, (x, y)


def of_networks(num: int, starts: int) -> dict[tuple[int, str], dict[bool, Count]]:
    counts = {(k, which): both_rules() for k, which in ((1, "LA"), (5, "LA"), (5, "BE"))}
    for i in range(num):
        model, loss, (x, y) = trained(i)
        risk = sharpness.EmpiricalRisk(model, loss, (x, y))
        wide = (x.double(), y if y.ndim == 1 else y.double())
        exact = sharpness.EmpiricalRisk(model.double(), loss, wide)
        pairs = sharpness.eigenpairs(exact, exact.n, method="dense", progress=False)
        truth = pairs.eigenvalues.numpy()
        for (k, which), count in counts.items():
            for seed in range(starts):
                generator = torch.Generator().manual_seed(1000 * i + seed)
                start = torch.randn(risk.n, generator=generator)
                compare(count, risk.hvp, truth, start, k=k, which=which, seed=seed)
        print(
            f"network {i + 1}: n = {risk.n}, loss {risk.value():.2g}, {truth[:5]}",
            flush=True,
        )
    return counts


# -- the table -----------------------------------------------------------------------------


def line(name: str, k: int, which: str, counts: dict[bool, Count]) -> str:
    num = len(counts[True].products)
    ratio = median(counts[True].products) / median(counts[False].products)
    cells = [name, str(k), which, str(num), *counts[False].row(), *counts[True].row()]
    return "| " + " | ".join([*cells, f"{ratio:.2f}"]) + " |"


def added(parts: list[dict[bool, Count]]) -> dict[bool, Count]:
    return {
        rule: Count(
            [p for part in parts for p in part[rule].products],
            sum(part[rule].converged for part in parts),
            sum(part[rule].right for part in parts),
        )
        for rule in (False, True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--spectra", type=int, default=1000)
    parser.add_argument("--networks", type=int, default=10)
    parser.add_argument("--starts", type=int, default=10)
    options = parser.parse_args()
    rule = "right | converged | products"
    print(f"| of | k | which | runs | without: {rule} | 95 %: {rule} | median ratio |")
    print("|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    each = -(-options.spectra // len(FAMILIES))
    for k in (1, 5):
        parts = []
        for family in FAMILIES:
            parts.append(of_spectra(family, k, "LA", each))
            print(line(family.__name__.replace("_", " "), k, "LA", parts[-1]), flush=True)
        print(line("all spectra", k, "LA", added(parts)), flush=True)
    for which in ("SA", "LM", "BE"):
        print(
            line("both signs", 5, which, of_spectra(both_signs, 5, which, each)), flush=True
        )
    for (k, which), counts in of_networks(options.networks, options.starts).items():
        print(line("trained networks", k, which, counts), flush=True)


if __name__ == "__main__":
    main()
