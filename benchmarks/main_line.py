"""The main line's two promises, measured on trained F1s and printed side by side.

    python benchmarks/main_line.py [FOLDER]

FOLDER holds `small-seed0.pt` and `large-seed0.pt` (default:
`runs/main-line`; they are trained if absent).

1. Top-5 eigenvalues to 1 %: Hessian-vector products, and the true relative error against
   a run to 1e-6.
2. Full-space phi(1e-3), ten iterations: the library's L-BFGS-B against SciPy's, each in
   turn in one process, and sign ascent beside them. SciPy's time is split into the risk's
   evaluations and its own bookkeeping.

Prints one table and writes the raw numbers as JSON beside this file.
"""

import json
import statistics
import sys
import time
from pathlib import Path

from sharpness import eigenpairs, epsilon_sharpness
from sharpness.lab import data
from sharpness.lab.run import train
from sharpness.lab.training import StoppingCriteria, Training, default_batch_sizes
from sharpness.loading import load_checkpoint
from sharpness.measurement import MeasurementSettings, risk_of
from sharpness.record import environment

ROUNDS = 3
EPOCHS = {"small": 20, "large": 40}


def main() -> None:
    default = "runs/main-line"
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else default)
    dataset = data.load("mnist5k")
    rows = []
    for role, size in zip(EPOCHS, default_batch_sizes(len(dataset.train[0])), strict=True):
        path = folder / f"{role}-seed0.pt"
        if not path.exists():
            training = Training(network="F1", batch_size=size)
            train(training, StoppingCriteria(epochs=EPOCHS[role]), dataset, path)
        for mode in ("batch", "running"):
            settings = MeasurementSettings(batchnorm=mode)
            risk = risk_of(load_checkpoint(path), settings)
            rows.append({"network": role, "batchnorm": mode, **measure(risk)})
            report(rows[-1])
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps({"rows": rows, "environment": environment()}, indent=1))
    print(f"raw numbers: {target}")


def measure(risk) -> dict:
    quick = eigenpairs(risk, 5, tol=1e-2, progress=False)
    exact = eigenpairs(risk, 5, tol=1e-6, progress=False)
    errors = (quick.eigenvalues - exact.eigenvalues).abs() / exact.eigenvalues.abs()
    gradient = timed(risk.gradient)
    found = {"num_hvps": quick.num_hvps, "worst_error": float(errors.max())}
    found |= {"gradient_seconds": gradient}
    for solver in ("lbfgsb", "scipy", "ascent"):
        found[solver] = {"seconds": [], "phi": None, "num_evals": None}
    for _ in range(ROUNDS):  # in turn, so that a change of the machine's speed hits all
        for solver in ("lbfgsb", "scipy", "ascent"):
            result = epsilon_sharpness(risk, 1e-3, solver=solver, progress=False)
            found[solver]["seconds"].append(result.seconds)
            found[solver] |= {"phi": result.phi, "num_evals": result.num_evals}
    return found


def timed(call) -> float:
    call()
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def report(row: dict) -> None:
    own, scipy = row["lbfgsb"], row["scipy"]
    seconds = {name: statistics.median(row[name]["seconds"]) for name in SOLVERS}
    outside = 1 - scipy["num_evals"] * row["gradient_seconds"] / seconds["scipy"]
    print(
        f"F1 {row['network']} batch, BatchNorm {row['batchnorm']}\n"
        f"  top-5 to 1 %: {row['num_hvps']} products, worst true error "
        f"{row['worst_error']:.2%}\n"
        f"  phi(1e-3): L-BFGS-B {own['phi']:.4g} % in {seconds['lbfgsb']:.2f} s "
        f"({own['num_evals']} evaluations); SciPy {scipy['phi']:.4g} % in "
        f"{seconds['scipy']:.2f} s, {outside:.0%} of it outside the evaluations; "
        f"ascent {row['ascent']['phi']:.4g} % in {seconds['ascent']:.2f} s\n"
        f"  time, L-BFGS-B / SciPy: {seconds['lbfgsb'] / seconds['scipy']:.3f}; "
        f"phi, L-BFGS-B / SciPy: {own['phi'] / scipy['phi']:.4f}",
        flush=True,
    )


SOLVERS = ("lbfgsb", "scipy", "ascent")

if __name__ == "__main__":
    main()
