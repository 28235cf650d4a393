"""A GPT-2-shaped model of 124 million parameters, measured on two cores within 6 GB.

    python benchmarks/language_model.py [agreement head lanczos measure ...]

Random weights: nothing is downloaded. With `transformers` installed it is its
`GPT2LMHeadModel`, else a plain module of the same shape. Each part is a process of its own,
so that its peak memory is its own:

`agreement`: the product through blocks of rows, classes and layers beside the plain one,
which has scores and graph whole, at 128 tokens, in float32 (7 GB).
`head`: bytes of the head's product (768 features, 50 257 classes) beside its inputs and
results, counted, at 128 to 1024 tokens; and those of the scores in float32.
`lanczos`: processor time of Lanczos' own steps with a basis in bfloat16 and in float32,
beside that of reading the basis twice a step: once as it is done, widened to float32 strip
by strip, once as the bytes are summed.
`measure`: the largest eigenvalue at 512 tokens, one sequence, under a limit of 6 GB on the
process's data. Six products at most: what they prove is printed with its bounds.

Results go to `language_model.json` beside this file; a part that is there is not run again.
About half an hour on two idle cores, most of it `measure`.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpness as sh
from sharpness import _tensors
from sharpness.krylov.lanczos import Lanczos
from sharpness.risk import large_heads, memory

RESULTS = Path(__file__).with_suffix(".json")
CLASSES, WIDTH, LAYERS, HEADS, PLACES = 50257, 768, 12, 12, 1024
TOKENS, LIMIT = (128, 256, 512, 1024), 6e9
_LANCZOS = 1 << 23  # entries of a vector, 12 steps
Row = dict[str, Any]


class Block(nn.Module):
    """A block of GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, 768) -> (N, T, 768)."""
        parts = self.attn(self.ln_1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(found.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.up(self.ln_2(x)), approximate="tanh")
        return x + self.down(hidden)


class Plain(nn.Module):
    """GPT-2's shape without `transformers`: tied embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(CLASSES, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.wte.weight
        for p in self.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T) tokens -> (N, T, V) scores."""
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1]))
        for block in self.h:
            h = block(h)
        return self.head(self.ln_f(h))


class Causal(nn.Module):
    """Scores with the classes second, as PyTorch's cross-entropy takes them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError:
            self.model: nn.Module = Plain()
        else:
            shape = {"vocab_size": CLASSES, "n_positions": PLACES, "n_embd": WIDTH}
            config = GPT2Config(**shape, n_layer=LAYERS, n_head=HEADS)
            self.model = GPT2LMHeadModel(config)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T) tokens -> (N, V, T) scores."""
        found = self.model(x)
        scores: Tensor = found if isinstance(found, Tensor) else found.logits
        return scores.transpose(1, 2)


def risk_at(tokens: int) -> sh.EmpiricalRisk:
    """One sequence of random tokens; each is to be foretold from those before it."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randint(CLASSES, (1, tokens), generator=draw)
    y = torch.cat([x[:, 1:], torch.full((1, 1), -100)], 1)
    return sh.EmpiricalRisk(
        Causal(), nn.CrossEntropyLoss(), (x, y), chunk_size=1, check=False
    )


def agreement() -> Row:
    """How far the product in parts is from the plain one, relative, in norm."""
    risk, most = risk_at(128), large_heads.LEAST_CLASSES
    v = torch.randn(risk.n, generator=torch.Generator().manual_seed(2))
    objective = risk._objective
    objective.blocks_again = objective.blocks
    mine = risk.hvp(v)
    large_heads.LEAST_CLASSES = CLASSES + 1
    plain = risk_at(128)
    plain._objective.blocks = []  # keeps all graphs
    theirs = plain.hvp(v)
    large_heads.LEAST_CLASSES = most
    apart = float(_tensors.norm64(mine - theirs) / _tensors.norm64(theirs))
    return {"tokens": 128, "n": risk.n, "blocks": len(objective.blocks), "apart": apart}


def head() -> Row:
    """Bytes of the head's product beside inputs and results, and those of the scores."""
    return {str(tokens): _head_bytes(tokens) for tokens in TOKENS}


def _head_bytes(tokens: int) -> Row:
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, WIDTH, generator=draw).requires_grad_()
    weight = (torch.randn(CLASSES, WIDTH, generator=draw) / 28).requires_grad_()
    targets = torch.randint(CLASSES, (tokens,), generator=draw)
    ends = [h, weight]

    def build() -> Callable[[], Any]:
        with large_heads.Postponed():
            loss = F.cross_entropy(F.linear(h, weight), targets)
        slopes = torch.autograd.grad(loss, ends, create_graph=True)
        return lambda: torch.autograd.grad(slopes, ends, [torch.ones_like(t) for t in ends])

    peak = memory.footprint(build).peak
    known = 3 * (h.nbytes + weight.nbytes)  # gradient, direction and product
    return {"extra_bytes": peak - known, "scores_bytes": 4 * tokens * CLASSES}


def lanczos() -> Row:
    """Processor seconds of twelve steps, and of reading their basis twice a step."""
    torch.set_num_threads(1)
    kinds = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    return {"n": _LANCZOS, "steps": 12, **{k: _lanczos_in(d) for k, d in kinds.items()}}


def _lanczos_in(dtype: torch.dtype) -> Row:
    found = [_steps(dtype) for _ in range(3)]  # in turn: the least of each
    return {name: min(row[name] for row in found) for name in found[0]}


def _steps(dtype: torch.dtype) -> Row:
    generator = torch.Generator().manual_seed(0)
    values = torch.linspace(-1, 1, _LANCZOS)
    values[:3] = torch.tensor([10.0, 7.0, 6.5])
    start = torch.randn(_LANCZOS, generator=generator)
    run, own, widening, summing = Lanczos(start, generator, dtype=dtype), 0.0, 0.0, 0.0
    for _ in range(12):
        product = values * run.direction()
        began = time.process_time()
        run.absorb(product, owned=True)
        own += time.process_time() - began
        blocks = run.state.store._upto(run.state.m)
        widening += _seconds(lambda b=blocks: [_widened(b) for _ in range(2)])
        summing += _seconds(lambda b=blocks: [_summed(b) for _ in range(2)])
    return {"own": own, "widening": widening, "summing": summing}


def _widened(blocks: Sequence[Tensor], width: int = 1 << 17) -> None:
    """Every entry as float32, a strip at a time; of float32 itself a copy in the cache."""
    for block in blocks:
        held = torch.empty(len(block), width)
        for strip in block.split(width, dim=1):
            held[:, : strip.shape[1]].copy_(strip)


def _summed(blocks: Sequence[Tensor]) -> None:
    """Every byte read once, as whole numbers, which takes the processor least."""
    for block in blocks:
        block.view(torch.int64).sum()


def _seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(tokens: int = 512, products: int = 6) -> Row:
    """The largest eigenvalue under the limit, and what it took."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(LIMIT),) * 2)
    began, used = time.monotonic(), time.process_time()
    risk = risk_at(tokens)
    plan = risk.prepare()
    built = time.monotonic() - began
    found = sh.eigenpairs(
        risk, k=1, basis_size=11, basis_dtype=torch.bfloat16, max_hvps=products
    )
    return {
        "tokens": tokens,
        "n": risk.n,
        "engine": plan.engine,
        "blocks_again": plan.blocks_again,
        "products": found.num_hvps,
        "eigenvalue": float(found.eigenvalues[0]),
        "error_bound": float(found.error_bounds[0]),
        "status": found.status.value,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds_to_plan": built,
        "seconds": time.monotonic() - began,
        "processor_seconds": time.process_time() - used,
    }


PARTS: dict[str, Callable[[], Row]] = {
    "agreement": agreement,
    "head": head,
    "lanczos": lanczos,
    "measure": measure,
}


def table(results: dict[str, Row]) -> str:
    """What the page shows of them, in Markdown."""
    rows: list[tuple[str, str]] = []
    if found := results.get("agreement"):
        rows += [("product in parts beside the plain one", f"{found['apart']:.1g} apart")]
    for tokens, row in results.get("head", {}).items():
        extra, scores = row["extra_bytes"] / 1e6, row["scores_bytes"] / 1e6
        rows += [(f"head at {tokens} tokens", f"{extra:.1f} MB beside {scores:.0f} MB")]
    for kind in ("bfloat16", "float32"):
        if kind in results.get("lanczos", {}):
            row = results["lanczos"][kind]
            ratio = row["own"] / row["widening"], row["own"] / row["summing"]
            words = f"{ratio[0]:.1f} × widening, {ratio[1]:.1f} × summing"
            rows += [(f"Lanczos' own steps, {kind}", words)]
    if found := results.get("measure"):
        value, bound = found["eigenvalue"], found["error_bound"]
        rows += [
            (f"λ_max at {found['tokens']} tokens", f"{value:.4g} ± {bound:.2g}"),
            ("products", f"{found['products']}"),
            ("peak memory of the process", f"{found['peak_bytes'] / 1e9:.2f} GB"),
            ("processor seconds", f"{found['processor_seconds']:.0f}"),
        ]
    return "\n".join(["| | |", "|---|--:|", *(f"| {a} | {b} |" for a, b in rows)])


def known() -> dict[str, Row]:
    """The results that are there."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main() -> None:
    """Run what is not there yet, a process for each part."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    unknown = set(given.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}. Known: {', '.join(PARTS)}.")
    for part in given.parts:
        if given.alone:
            print(json.dumps(PARTS[part]()))
        elif part not in known():
            command = [sys.executable, __file__, "--alone", part]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found = {**known(), part: json.loads(done.stdout.splitlines()[-1])}
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    if not given.alone:
        print(table(known()))


if __name__ == "__main__":
    main()
