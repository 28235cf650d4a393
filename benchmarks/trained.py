"""The trained networks that spectra.py measures, and their samples.

    python benchmarks/trained.py [F1 C1 ResNet-20 GPT]

Trains each network once (ten minutes on one core for all) and keeps it in `runs/spectra/`:

- F1 on 4096 images of `mnist5k`, C1 on 512 and ResNet-20 on 256 of them: Adam 1e-3,
  batch 32, on the 4000 training images.
- GPT on 32 sequences of 64 tokens from a seeded Markov chain: Adam 1e-3, batch 32.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from products import GPT, resnet20
from torch import Tensor, nn

from sharpness.lab import data, networks

FOLDER = Path(__file__).resolve().parents[1] / "runs" / "spectra"


@dataclass(frozen=True)
class Case:
    """A network, the samples it is measured on, and in how many equal batches."""

    name: str
    samples: int
    batches: int
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
        Case("F1", 4096, 4, 10, lambda: networks.f1()),
        # Batches of 64: larger ones take every contender longer (docs/decisions.md).
        Case("C1", 512, 8, 4, lambda: networks.c1(1, 28)),
        Case("ResNet-20", 256, 4, 4, small_resnet),
        Case("GPT", 32, 4, 8, GPT),
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


def main() -> None:
    for name in sys.argv[1:] or CASES:
        trained(CASES[name])


if __name__ == "__main__":
    main()
