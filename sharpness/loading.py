"""Anybody's checkpoint made ready to be measured: its network, its data, its loss."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from sharpness import _tensors, checkpoint
from sharpness._arguments import ensure, explained
from sharpness._results import counted
from sharpness.checkpoint import Checkpoint
from sharpness.lab import data as lab_data
from sharpness.lab import networks
from sharpness.lab.data import at_random, class_balanced, has_classes
from sharpness.lab.named import DATA, parsed
from sharpness.risk.batches import taken
from sharpness.risk.objective import call_model

Pair = tuple[Any, Tensor]
USUAL_SAMPLES = 1000
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
_SPEC = "package.module:factory or file.py:factory, with ?name=value&... for arguments"


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A network with the parameters of a checkpoint, and the data it is measured on."""

    path: str
    network_name: str
    model: nn.Module = field(repr=False)
    train: Pair = field(repr=False)
    test: Pair | None = field(repr=False)
    loss: nn.Module
    data: dict[str, Any]  # name and, for a named set, sha256
    start: Tensor | None = field(repr=False)  # the parameters training began with
    facts: dict[str, Any]  # what a record says of the checkpoint

    @property
    def dtype(self) -> torch.dtype:
        """The type of the network's parameters."""
        kinds = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        return kinds[0] if kinds else torch.float32

    def part(self, split: str) -> Pair:
        """The samples of a split.

        Raises:
            ValueError: there are no test samples.
        """
        if split == "train":
            return self.train
        if self.test is None:
            raise ValueError(
                f"`--split` must be 'train' for {self.data['name']}; got 'test', and the "
                "data have no test part. Return {'train': ..., 'test': ...}."
            )
        return self.test

    def samples(
        self, split: str, num_samples: int | None, seed: int, *, balanced: bool = True
    ) -> Pair:
        """Some samples of a split: class-balanced, or at random without classes."""
        pair = self.part(split)
        targets = pair[1]
        if num_samples is None or num_samples == len(targets):
            return pair
        if balanced and has_classes(targets):
            return taken(pair, class_balanced(targets, num_samples, seed))
        return taken(pair, at_random(len(targets), num_samples, seed))

    def usual_number(self, split: str) -> int | None:
        """1000 samples, or as many balanced ones as there are; None for all."""
        targets = self.part(split)[1]
        most = len(targets)
        if has_classes(targets):
            sizes = torch.bincount(targets)
            most = min(most, int(sizes[sizes > 0].min()) * int((sizes > 0).sum()))
        return None if len(targets) <= USUAL_SAMPLES else min(USUAL_SAMPLES, most)


def load_checkpoint(
    path: str | Path,
    *,
    network: str | None = None,
    data: str | None = None,
    loss: str | None = None,
    data_dir: str | Path | None = None,
) -> LoadedCheckpoint:
    """A checkpoint with its network and data.

    One that sharpness has written knows both. Any other needs `network`, which is asked
    for a module, and `data`; its file may hold a state dict, alone or under the usual
    names. Nothing in a checkpoint is executed; factories are the caller's own code.

    Args:
        path: a `.pt`, `.pth`, `.bin` or `.safetensors` file.
        network: `package.module:factory` or `file.py:factory`, with arguments as in
            `?depth=20&width=16`; `timm:resnet18?num_classes=10`; or
            `transformers:FOLDER`, a folder with a configuration of a classifier.
        data: a set of `lab.named.DATA`; an `.npz` file with x and y (or x_train,
            y_train, x_test, y_test); or a factory that returns a pair (inputs, targets),
            a list of such batches or a loader, or a dict of these by split.
        loss: `cross-entropy`, `mse`, or a factory; None goes by the targets' type.
        data_dir: where the files of named sets lie.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no checkpoint or would run code, a factory that is not
            there or does not fit, parameters of another network, missing data.
    """
    saved = checkpoint.load_any(path)
    name: Any = network or saved.network.get("name")
    ensure(
        name is not None,
        "--network",
        f"say what `{path}` is a checkpoint of",
        "none, and the file was not written by sharpness",
        f"Give {_SPEC}.",
    )
    model = made_network(network) if network else networks.build(saved.network)
    _load_parameters(model, saved.state_dict, path, name)
    source: Any = data or saved.data.get("name")
    ensure(
        source is not None,
        "--data",
        f"say what `{path}` is measured on",
        "none",
        f"Give a named set ({', '.join(DATA)}), an .npz file, or {_SPEC}.",
    )
    splits, about = _made_data(source, data_dir, as_trained=not data)
    for pair in splits.values():
        _check_lengths(pair, source)
    ensure(
        bool(data) or saved.data.get("sha256") in (None, about.get("sha256")),
        path,
        f"have been trained on this {source}",
        "a checkpoint of other data with that name (sha256 differs)",
        "Point --data-dir at it.",
    )
    kept = ("batch_size", "seed", "learning_rate", "optimizer", "epoch", "metrics")
    training = {key: saved.training.get(key) for key in kept} if saved.training else {}
    subject = LoadedCheckpoint(
        path=str(path),
        network_name=name,
        model=model.eval(),
        train=splits["train"],
        test=splits.get("test"),
        loss=_made_loss(loss, splits["train"][1]),
        data={**about, "loss": loss},
        start=None if network else _start(saved),
        facts={
            "path": str(path),
            "sha256": saved.sha256,
            "network": saved.network or {"name": name},
            "start": saved.start,
            "training": training,
        },
    )
    _check_fit(subject, source)
    return subject


def _check_fit(subject: LoadedCheckpoint, source: str) -> None:
    """Try two samples: what does not fit should fail here, in one line."""
    first = torch.arange(min(2, len(subject.train[1])))
    inputs, targets = as_type(taken(subject.train, first), subject.dtype)
    loss = subject.data["loss"] or "the usual loss"
    with (
        explained(
            "--data",
            "fit the network and the loss",
            f"{source}, {subject.network_name} and {loss}",
            "Check shapes and types, --network and --loss.",
        ),
        torch.no_grad(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error")  # a squared error of shapes that broadcast
        subject.loss(call_model(subject.model, inputs), targets)


def as_type(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in another precision."""
    return tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, value
    )


# -- networks --------------------------------------------------------------------------


def made_network(spec: str) -> nn.Module:
    """A module from `package.module:factory?args`, `timm:...` or `transformers:...`."""
    kind, _, rest = spec.partition(":")
    if kind == "timm":
        name, arguments = parsed(rest)
        create = _package("timm", spec).create_model
        model = _called("--network", spec, partial(create, name, **arguments))
    elif kind == "transformers":
        model = _classifier(spec, rest)
    else:
        model = _called("--network", spec, _factory("--network", spec))
    got = f"{type(model).__name__} from {spec}"
    sound = isinstance(model, nn.Module)
    ensure(sound, "--network", "make a torch.nn.Module", got, "Return the module.")
    return cast(nn.Module, model)


class _Logits(nn.Module):
    """A classifier of Hugging Face that returns its logits as a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return cast(Tensor, self.model(*args, **kwargs).logits)


def _classifier(spec: str, folder: str) -> nn.Module:
    transformers = _package("transformers", spec)
    contract, advice = "name a folder with the config.json of a classifier", "Save it with "
    there = Path(folder, "config.json").is_file()
    ensure(there, "--network", contract, repr(folder), f"{advice}`save_pretrained`.")
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with explained("--network", contract, repr(folder)):
        config = transformers.AutoConfig.from_pretrained(folder, **local)
        name = (config.architectures or [""])[0]
        if name and not name.endswith(("Classification", "LMHeadModel", "ForCausalLM")):
            raise TypeError(f"{name} is no classifier")
        if hasattr(transformers, name):
            return _Logits(getattr(transformers, name)(config))
        automatic = transformers.AutoModelForSequenceClassification
        return _Logits(automatic.from_config(config, trust_remote_code=False))


def _load_parameters(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path, name: str
) -> None:
    ensure(
        not any(isinstance(p, UninitializedParameter) for p in model.parameters()),
        "--network",
        "make a network with all its parameters",
        f"{name}, which waits for a first batch (lazy layers)",
        "Run it on one in the factory.",
    )
    ours = model.state_dict()
    theirs = _matching(state, ours)
    shapes = [{k: v.shape for k, v in some.items()} for some in (ours, theirs)]
    wrong = [key for key in {**ours, **theirs} if shapes[0].get(key) != shapes[1].get(key)]
    ensure(
        not wrong,
        path,
        f"hold the parameters of {name}",
        f"others: {counted(len(wrong), 'tensor')} differ{'s' if len(wrong) == 1 else ''}, "
        f"first {wrong[0] if wrong else None}",
        "Name the network it was trained with.",
    )
    kinds = {value.dtype for value in theirs.values() if value.is_floating_point()}
    if kinds == {torch.float64}:
        model.double()  # a factory makes float32; loading would round
    model.load_state_dict(dict(theirs))


def _matching(state: Mapping[str, Tensor], ours: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The tensors under the model's names; prefixes of wrappers are removed or added."""
    while set(state) != set(ours):
        shared = [p for p in _PREFIXES if state and all(k.startswith(p) for k in state)]
        if not shared:
            break
        state = {key.removeprefix(shared[0]): value for key, value in state.items()}
    if {f"model.{key}" for key in state} == set(ours):
        state = {f"model.{key}": value for key, value in state.items()}
    return state


def _start(saved: Checkpoint) -> Tensor | None:
    """The parameters a training of ours began with, if they can be made again."""
    fresh = networks.build(saved.network)
    networks.initialise(fresh, int(saved.start.get("seed", 0)))
    if networks.digest(fresh) != saved.start.get("sha256"):
        return None
    return _tensors.flatten(p.detach() for p in fresh.parameters())


# -- data ------------------------------------------------------------------------------


def _made_data(
    source: str, data_dir: str | Path | None, *, as_trained: bool
) -> tuple[dict[str, Pair], dict[str, Any]]:
    """The splits, and what a record says of them; `as_trained` scales bytes."""
    if source.endswith(".npz") and not as_trained:
        return _from_npz(source), {"name": source}
    if ":" not in source or as_trained:
        try:
            dataset = _named_set(source, data_dir=data_dir)
        except ValueError as error:
            raise ValueError(str(error).replace("`name`", "`--data`")) from None
        about = {"name": dataset.name, "sha256": dataset.sha256}
        return {"train": dataset.train, "test": dataset.test}, about
    made = _called("--data", source, _factory("--data", source))
    splits = made if isinstance(made, Mapping) and "train" in made else {"train": made}
    return {k: _as_pair(v, source) for k, v in splits.items()}, {"name": source}


_named_set = lru_cache(maxsize=1)(lab_data.load)  # many checkpoints of one set are usual


def _from_npz(source: str) -> dict[str, Pair]:
    try:
        parts = lab_data.read_npz(source)
    except (OSError, ValueError) as error:
        raise ValueError(str(error).replace(f"`{source}`", f"`--data {source}`")) from None
    return {split: (x, _targets(y)) for split, (x, y) in parts.items()}


def _targets(y: Tensor) -> Tensor:
    return y if y.is_floating_point() else y.long()


def _as_pair(made: Any, source: str) -> Pair:
    """A pair as it is; batches and loaders joined into one."""
    if isinstance(made, tuple | list) and len(made) == 2 and isinstance(made[1], Tensor):
        return _plain(made[0]), made[1]
    parts = list(made) if hasattr(made, "__iter__") else []
    paired = all(isinstance(part, tuple | list) and len(part) == 2 for part in parts)
    contract = "give a pair (inputs, targets), a list of such batches, or a loader"
    got = f"{type(made).__name__} from {source}"
    ensure(bool(parts) and paired, "--data", contract, got)
    pairs = [(_plain(inputs), targets) for inputs, targets in parts]
    for pair in pairs:
        _check_lengths(pair, source)
    return cast(Pair, tree_map(lambda *several: torch.cat(several), *pairs))


def _plain(inputs: Any) -> Any:
    """Several inputs as PyTorch's trees know them: a dict, or a tuple."""
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return tuple(inputs) if isinstance(inputs, list) else inputs


def _check_lengths(pair: Pair, source: str) -> None:
    """Refuse inputs that have not one row for each target."""
    leaves = [leaf for leaf in tree_leaves(pair[0]) if isinstance(leaf, Tensor)]
    lengths = [len(leaf) if leaf.ndim else 0 for leaf in (*leaves, pair[1])]
    sound = bool(leaves) and len(set(lengths)) == 1 and 0 not in lengths
    contract = "give as many inputs as targets, and at least one"
    ensure(sound, "--data", contract, f"{' and '.join(map(str, lengths))} from {source}")


def _made_loss(spec: str | None, targets: Tensor) -> nn.Module:
    if spec is None:
        spec = "mse" if targets.is_floating_point() else "cross-entropy"
    if spec in ("cross-entropy", "mse"):
        return nn.CrossEntropyLoss() if spec == "cross-entropy" else nn.MSELoss()
    made = _called("--loss", spec, _factory("--loss", spec))
    got = f"{type(made).__name__} from {spec}"
    ensure(callable(made), "--loss", "make a loss to be called", got)
    return cast(nn.Module, made)


# -- factories -------------------------------------------------------------------------


def _factory(flag: str, spec: str) -> Callable[[], Any]:
    """The callable that `package.module:factory?arguments` names, arguments filled in."""
    head, mark, query = spec.partition("?")
    where, colon, name = head.rpartition(":")
    arguments = parsed(f"{name}{mark}{query}")[1]
    ensure(bool(where and colon and name), flag, f"be {_SPEC}", repr(spec))
    factory: Any = getattr(_module(flag, where), name, None)
    contract = f"name a function or class of {where}"
    ensure(callable(factory), flag, contract, f"{name!r}, which is not there")
    return partial(factory, **arguments)


def _module(flag: str, where: str) -> ModuleType:
    """A module by its dotted name or its file; the current folder comes first."""
    with explained(flag, "name a module that can be imported", repr(where)):
        if where.endswith(".py"):
            found = importlib.util.spec_from_file_location(Path(where).stem, where)
            if found is None or found.loader is None or not Path(where).is_file():
                raise ImportError("no such file")
            module = importlib.util.module_from_spec(found)
            sys.modules.setdefault(found.name, module)
            found.loader.exec_module(module)
            return module
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(where)


def _called(flag: str, spec: str, factory: Callable[[], Any]) -> Any:
    with explained(flag, "work when called", spec):
        return factory()


def _package(name: str, spec: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ValueError(
            f"`--network` must name an installed package; got {spec!r}, and {name} is not "
            f"there. Install it: pip install {name}."
        ) from None
