"""The trained networks that spectra.py measures, and the truth about them.

    python benchmarks/trained.py [F1 C1 ResNet-20 GPT]

Trains each network, or carries on where it was killed, and computes its reference values in
float64; all goes to `runs/spectra/`, which every later run reads.

- F1 on 4096 images of `mnist5k`, C1 on 512 and ResNet-20 on 256 of them: Adam 1e-3,
  batch 32, on the 4000 training images.
- GPT on 32 sequences of 64 tokens from a seeded Markov chain: Adam 1e-3, batch 32.
- The largest eigenvalues to 1e-8 by Lanczos in float64, and for F1 the trace by Hutch++
  in float64 with its standard error.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from products import GPT, resnet20
from torch import Tensor, nn

from sharpness import EmpiricalRisk, eigenpairs, trace
from sharpness.lab import data, networks

FOLDER = Path(__file__).resolve().parents[1] / "runs" / "spectra"


@dataclass(frozen=True)
class Case:
    """A network, the samples it is measured on, and in how many equal batches."""

    name: str
    samples: int
    batches: int
    top: int  # reference eigenvalues
    trace_products: int  # spent on a reference trace; 0 for none
    epochs: int
    build: Callable[[], nn.Module]

    @property
    def rows_of_a_batch(self) -> int:
        return self.samples // self.batches

    @property
    def attention(self) -> bool:
        return self.name == "GPT"


def small_resnet() -> nn.Module:
    """ResNet-20 for grey images."""
    model = resnet20()
    model[0] = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
    return model


CASES = {
    case.name: case
    for case in (
        Case("F1", 4096, 4, 50, 150, 10, lambda: networks.f1()),
        # Batches of 64: larger ones take every contender longer (docs/decisions.md).
        Case("C1", 512, 8, 5, 0, 4, lambda: networks.c1(1, 28)),
        Case("ResNet-20", 256, 4, 5, 0, 4, small_resnet),
        Case("GPT", 32, 4, 5, 0, 8, GPT),
    )
}


def samples(case: Case) -> tuple[Tensor, Tensor]:
    """What is measured."""
    if case.attention:
        return markov_chain(case.samples, seed=1)
    mnist = data.load("mnist5k")
    x, y = (torch.cat(parts) for parts in zip(mnist.train, mnist.test, strict=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order[: case.samples]], y[order[: case.samples]]


def markov_chain(sequences: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and the ones that follow; each token has four likely successors."""
    draw = torch.Generator().manual_seed(0)
    likely = torch.randint(GPT.vocabulary, (GPT.vocabulary, 4), generator=draw)
    draw.manual_seed(seed)
    tokens = [torch.randint(GPT.vocabulary, (sequences,), generator=draw)]
    for _ in range(GPT.length):
        pick = torch.randint(4, (sequences,), generator=draw)
        tokens.append(likely[tokens[-1], pick])
    row = torch.stack(tokens, 1)
    return row[:, :-1].contiguous(), row[:, 1:].contiguous()


def trained(case: Case) -> nn.Module:
    """The network in evaluation mode, trained once and kept."""
    path = FOLDER / f"{case.name}.pt"
    model = case.build()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    torch.manual_seed(0)
    networks.initialise(model, 0)
    pool = markov_chain(1024, 2) if case.attention else data.load("mnist5k").train
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for epoch in range(case.epochs):
        for index in torch.randperm(len(pool[1])).split(32):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(pool[0][index]), pool[1][index])
            loss.backward()
            optimizer.step()
        print(
            f"{case.name}: epoch {epoch + 1}, loss {float(loss.detach()):.4f}",
            file=sys.stderr,
        )
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model.eval()


def truth(case: Case) -> dict[str, Any]:
    """Reference values, computed once and kept."""
    path = FOLDER / f"{case.name}-truth.json"
    if path.exists():
        return json.loads(path.read_text())
    risk = EmpiricalRisk(trained(case).double(), nn.CrossEntropyLoss(), as_double(case))
    began = time.monotonic()
    budget = {"seed": 99, "max_hvps": 2000}
    pairs = eigenpairs(risk, case.top, tol=1e-8, **budget).raise_for_status()
    found = {
        "eigenvalues": pairs.eigenvalues.tolist(),
        "error_bounds": pairs.error_bounds.tolist(),
        "num_hvps": pairs.num_hvps,
        "value": risk.value(),
        "parameters": risk.n,
    }
    if case.trace_products:
        total = trace(risk, tol=1e-3, seed=99, max_hvps=case.trace_products)
        found |= {"trace": total.value, "trace_standard_error": total.standard_error}
    path.write_text(json.dumps(found) + "\n")
    seconds = time.monotonic() - began
    print(f"{case.name}: {pairs}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return found


def as_double(case: Case) -> tuple[Tensor, Tensor]:
    x, y = samples(case)
    return (x.double() if x.is_floating_point() else x), y


def main() -> None:
    for name in sys.argv[1:] or CASES:
        trained(CASES[name])
    for name in sys.argv[1:] or CASES:
        truth(CASES[name])


if __name__ == "__main__":
    main()
