"""How long eigenpairs take by samples N, parameters n and pairs k, beside two peers.

    python benchmarks/scaling.py          (three minutes on one idle core)
    python benchmarks/scaling.py --draw

A perceptron on random images of ten classes, trained with 200 steps of Adam; N = 500,
width 64 (n = 55 050) and k = 1 where they are not varied. User seconds on one thread,
building included, the less of two runs in turn, by rules that a user can apply:

- sharpness: its defaults (1 %, 95 % confidence);
- hessian-eigenthings: `tol=1e-2`, `max_iter` from 2 k, doubled until its flags are set;
- curvlinops: SciPy's `eigsh` with `tol=1e-2`.

Writes `scaling.json` beside this file point by point, and docs/scaling.svg.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from products import ROOT, get_ready, processor, say, version_of
from torch import Tensor, nn

import sharpness

TARGET = Path(__file__).with_suffix(".json")
PICTURE = ROOT / "docs" / "scaling.svg"
BASE = {"N": 500, "width": 64, "k": 1}
VARIED: dict[str, tuple[int, ...]] = {
    "N": (125, 250, 500, 1000, 2000),
    "width": (16, 32, 64, 128, 256),
    "k": (1, 2, 5, 10, 20),
}
ROUNDS = 2
SECONDS = (0.05, 0.1, 0.2, 0.5, 1)  # on the axis
Data = tuple[Tensor, Tensor]
Solve = Callable[[nn.Module, Data, int], int]


def problem(num: int, width: int) -> tuple[nn.Module, Data]:
    """The network, trained, and its samples: classes are clouds that overlap."""
    torch.manual_seed(0)
    y = torch.randint(10, (num,))
    x = torch.randn(num, 784) + 0.3 * torch.randn(10, 784)[y]
    layers = [nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(200):
        rows = torch.randint(num, (100,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval(), (x, y)


def ours(model: nn.Module, data: Data, k: int) -> int:
    risk = sharpness.EmpiricalRisk(model, nn.CrossEntropyLoss(), data)
    return sharpness.eigenpairs(risk, k, progress=False).num_hvps


def eigenthings(model: nn.Module, data: Data, k: int) -> int:
    import hessian_eigenthings as peer

    loss = peer.supervised_loss(nn.CrossEntropyLoss())
    operator = peer.HessianOperator(model, [data], loss, method="autograd")
    made, steps, options = 0, k, {"k": k, "tol": 1e-2, "which": "LA", "seed": 0}
    while True:
        steps *= 2
        found = peer.lanczos(operator, max_iter=steps, reorthogonalize=True, **options)
        made += steps
        if bool(found.converged.all()):
            return made


def curvlinops(model: nn.Module, data: Data, k: int) -> int:
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import eigsh

    parameters = list(model.parameters())
    matrix = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), parameters, [data], check_deterministic=False
    ).to_scipy()
    made, product = 0, matrix._matvec

    def counted(v: Any) -> Any:
        nonlocal made
        made += 1
        return product(v)

    matrix._matvec = counted
    eigsh(matrix, k, which="LA", tol=1e-2)
    return made


CONTENDERS: dict[str, Solve] = {
    "sharpness": ours,
    "hessian-eigenthings, its flags, doubling": eigenthings,
    "curvlinops + ARPACK, tol 1e-2": curvlinops,
}


def measured(at: dict[str, int]) -> dict[str, Any]:
    """Seconds and products of each contender at one point."""
    model, data = problem(at["N"], at["width"])
    found: dict[str, Any] = {name: {"seconds": []} for name in CONTENDERS}
    for _ in range(ROUNDS):
        for name, solve in CONTENDERS.items():
            began = time.process_time()
            found[name]["products"] = solve(model, data, at["k"])
            found[name]["seconds"].append(time.process_time() - began)
    n = sum(p.numel() for p in model.parameters())
    return {"at": at, "n": n, "contenders": found}


def draw(found: dict[str, Any]) -> None:
    """Three panels: by N, n and k."""
    import matplotlib.pyplot as plt

    # Letters as letters, and the same file from the same numbers.
    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "scaling"}
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), sharey=True, layout="constrained")
    labels = {"N": "samples N", "width": "parameters n", "k": "pairs k"}
    for ax, (what, label) in zip(axes, labels.items(), strict=True):
        points = [found["points"][f"{what}={value}"] for value in VARIED[what]]
        places = [p["n"] if what == "width" else p["at"][what] for p in points]
        for name, mark in zip(CONTENDERS, "os^", strict=True):
            each = [min(p["contenders"][name]["seconds"]) for p in points]
            ax.loglog(places, each, marker=mark, markersize=4, label=name)
        ax.minorticks_off()
        ax.set_xticks(places, [f"{p / 1000:.0f} k" if p > 9999 else str(p) for p in places])
        ax.set_xlabel(label)
    axes[0].set_yticks(SECONDS, [f"{seconds:g}" for seconds in SECONDS])
    axes[0].set_ylabel("user seconds")
    lines = axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")
    options = parser.parse_args()
    get_ready()
    torch.set_num_threads(1)
    packages = ("torch", "hessian-eigenthings", "curvlinops-for-pytorch", "scipy")
    found: dict[str, Any] = {"points": {}}
    if TARGET.exists():
        found = json.loads(TARGET.read_text())
    for what, values in VARIED.items():
        for value in values:
            name = f"{what}={value}"
            if options.draw or name in found["points"]:
                continue
            found["points"][name] = measured({**BASE, what: value})
            versions = {package: version_of(package) for package in packages}
            found["setting"] = {"processor": processor("cpu"), "versions": versions}
            TARGET.write_text(json.dumps(found, indent=1) + "\n")
            say(f"{name}: {found['points'][name]}")
    draw(found)


if __name__ == "__main__":
    main()
