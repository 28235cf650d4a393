"""The blocks of the documents' pages, and small files in place of those they name.

A block of Python or shell is run, unless the line above it says why it cannot be:

    <!-- not run: needs a GPU -->

A page that goes on where another ended names it: `<!-- after: docs/other.md -->`.
"""

import re
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch

from helpers.studies import TINY_NETWORK, tiny
from sharpness import compare, landscape, measure, train
from sharpness.batchsize import __main__ as batchsize
from sharpness.lab import data
from sharpness.lab.run import train as trained
from sharpness.lab.training import StoppingCriteria, Training
from sharpness.reproduce import __main__ as reproduce

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
)
COMMANDS = {
    "sharpness.measure": measure,
    "sharpness.compare": compare,
    "sharpness.landscape": landscape,
    "sharpness.train": train,
    "sharpness.reproduce": reproduce,
    "sharpness.batchsize": batchsize,
}
# What makes a command of a page cheap; the last of two equal flags counts.
CHEAPER = {
    "sharpness.measure": "--num-samples 64",
    "sharpness.compare": "--num-samples 64",
    "sharpness.landscape": "--num-samples 64 --num-points 3 --num-steps 3",
    "sharpness.train": "--updates 1 --seeds 1 --jobs 1",
    "sharpness.reproduce": "--jobs 1",  # of studies that are tiny
    "sharpness.batchsize": "--max-seconds 5",
}
# In the place of sets in files, which a test may not download, and of what takes long.
SMALLER = {"mnist": "digits", "cifar10": "digits", "256,6000": "32,256"}
SMALLEST = SMALLER | {"mnist5k": "digits", "F1": "MLP?width=8&depth=1"}
_FENCE = re.compile(r"( *)(```+)(\w*)$")
_MARK = re.compile(r" *<!-- (not run|after): (.+) -->$")


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    language: str
    text: str
    not_run: str = ""  # why
    after: str = ""  # the page whose session it goes on from


def blocks_of(page, *languages):
    """Those of `languages`, in the order of the page."""
    found, lines = [], iter(page.read_text(encoding="utf-8").splitlines())
    marks = {}
    for line in lines:
        if mark := _MARK.match(line):
            marks[mark[1]] = mark[2]
        elif fence := _FENCE.match(line):
            inside = list(iter(lambda: next(lines), fence[1] + fence[2]))
            text = "".join(f"{text.removeprefix(fence[1])}\n" for text in inside)
            given = marks.get("not run", ""), marks.get("after", "")
            found.append(Block(fence[3], text, *given))
            marks = {}
        elif line.strip():
            marks = {}
    return [block for block in found if block.language in languages]


def commands_of(text):
    """The commands of a block of shell, each as its words."""
    lines = text.replace("\\\n", " ").splitlines()
    words = (shlex.split(line, comments=True) for line in lines)
    return [part for line in words for part in _between(line, "&&") if part]


def _between(words, separator):
    parts = [[]]
    for word in words:
        parts.append([]) if word == separator else parts[-1].append(word)
    return parts


def is_installing(words):
    """Whether this makes an environment, which a test of one page does not do again."""
    return words[1:3] == ["-m", "venv"] or words[0].endswith("/pip")


def runs_well(words):
    """Run `python -m sharpness...` here, in a cheap setting.

    An advice on a batch size may end before its target: a test gives it few seconds.
    """
    assert re.fullmatch(r"(\.venv/bin/)?python", words[0]), words
    assert words[1] == "-m", words
    cheaper = shlex.split(CHEAPER[words[2]])
    smaller = SMALLEST if words[2] == "sharpness.batchsize" else SMALLER
    given = [smaller.get(word, word) for word in words[3:]]
    code = COMMANDS[words[2]].main([*given, *cheaper])
    return code == 0 or (code == 1 and words[2] == "sharpness.batchsize")


def with_tiny_studies(paper):
    """`paper` as it is run here; by the names that its own studies have."""
    studies = [replace(tiny(study), network=TINY_NETWORK) for study in paper.studies]
    return replace(paper, studies=tuple(studies))


# -- the files that commands name --------------------------------------------------------

CODE = """
import torch

def ResNet(depth, width):
    layers = [torch.nn.Conv2d(3, width, 3, padding=1), torch.nn.ReLU()]
    for _ in range(depth // 10 - 1):
        layers += [torch.nn.Conv2d(width, width, 3, padding=1), torch.nn.ReLU()]
    ends = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, 10)
    return torch.nn.Sequential(*layers, *ends)

def cifar_subset():
    torch.manual_seed(0)
    return torch.randn(100, 3, 8, 8), torch.randint(10, (100,))

def make():
    return torch.nn.Sequential(
        torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    )

def rows():
    torch.manual_seed(0)
    x = torch.randn(3000, 3)
    return x, x.sum(1, keepdim=True) + 0.1 * torch.randn(3000, 1)
"""


def user_files(folder):
    """Networks and data of a user's own, and checkpoints where the pages have theirs."""
    for name in ("models.py", "data.py", "loaders.py"):
        (folder / name).write_text(CODE)
    made = {}
    exec(CODE, made)
    torch.manual_seed(0)
    torch.save(made["ResNet"](20, 16).state_dict(), folder / "resnet.pt")
    torch.save(made["make"]().state_dict(), folder / "checkpoint.pt")
    x, y = made["rows"]()
    table = pd.DataFrame(x.numpy(), columns=list("abc")).assign(price=y[:, 0].numpy())
    table.to_csv(folder / "table.csv", index=False)
    shutil.copytree(ROOT / "examples", folder / "examples")


def checkpoints(folder):
    """A pair of two starting points, under every name that a page gives such networks."""
    digits = data.load("digits")
    for seed in (0, 1):
        for size, batch_size, quick in (("small", 32, "b32"), ("large", 400, "b400")):
            training = Training(
                network="MLP?width=8&depth=1", batch_size=batch_size, seed=seed
            )
            epochs = 20 if quick == "b32" else 40
            first = folder / f"runs/f1/{size}-seed{seed}.pt"
            trained(training, StoppingCriteria(updates=300), digits, first)
            for name in (
                f"runs/f1-mnist5k/{size}-seed{seed}.pt",
                f"runs/reproduce-quick/networks/F1-{quick}-s{seed}-e{epochs}-0.pt",
            ):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(first, folder / name)
