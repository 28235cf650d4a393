"""The network, data and loss a checkpoint is measured with; `checkpoint` reads the file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from sharpness import _tensors, checkpoint, state_dicts
from sharpness._arguments import ensure, explained
from sharpness.checkpoint import Checkpoint
from sharpness.lab import data as lab_data
from sharpness.lab import networks
from sharpness.lab.data import at_random, class_balanced, has_classes
from sharpness.lab.named import DATA, parsed
from sharpness.measures.gradient_noise import training_facts
from sharpness.risk import batches, files, intake
from sharpness.risk.batches import as_pair, taken
from sharpness.risk.model_state import random_generators_kept
from sharpness.risk.objective import call_model

Pair = tuple[Any, Tensor]
USUAL_SAMPLES = 1000
_SPEC = "package.module:factory or file.py:factory, with ?name=value&... for arguments"


class Samples:
    """A part of the data: its targets, and what reads the samples at some positions.

    Those of a file are read when they are taken; the last that were taken are kept.
    """

    def __init__(self, targets: Tensor, read: Callable[[Tensor | None], Pair]) -> None:
        self.targets, self._read = targets, read
        self._kept: tuple[tuple[int, ...] | None, Pair] | None = None

    @classmethod
    def held(cls, pair: Pair) -> Samples:
        """Those of a pair in memory."""
        return cls(pair[1], lambda rows: pair if rows is None else taken(pair, rows))

    def taken(self, rows: Tensor | None) -> Pair:
        """The samples at these sorted positions; None for all."""
        key = None if rows is None else tuple(rows.tolist())
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._read(rows)
        return self._kept[1]


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A network with the parameters of a checkpoint, and the data it is measured on."""

    path: str
    network_name: str
    model: nn.Module = field(repr=False)
    parts: Mapping[str, Samples] = field(repr=False)  # "train", and "test" if there is one
    loss: nn.Module
    data: dict[str, Any]  # name and, for a named set, sha256
    start: Tensor | None = field(repr=False)  # the parameters training began with
    facts: dict[str, Any]  # what a record says of the checkpoint
    notes: tuple[str, ...] = ()  # what was done to make them fit, a line each

    @property
    def dtype(self) -> torch.dtype:
        """The type of the network's parameters."""
        kinds = [p.dtype for p in self.model.parameters() if p.is_floating_point()]
        return kinds[0] if kinds else torch.float32

    @property
    def train(self) -> Pair:
        """All samples to train on, read into memory."""
        return self.part("train")

    def part(self, split: str) -> Pair:
        """All samples of a split, read into memory.

        Raises:
            ValueError: there are no test samples.
        """
        return self._taken(split, None)

    def targets(self, split: str) -> Tensor:
        """The targets of a split, as they are in the data.

        Raises:
            ValueError: there are no test samples.
        """
        if split not in self.parts:
            raise ValueError(
                f"`--split` must be 'train' for {self.data['name']}; got 'test', and the "
                "data have no test part. Return {'train': ..., 'test': ...}."
            )
        return self.parts[split].targets

    def _taken(self, split: str, rows: Tensor | None) -> Pair:
        """As the loss takes them: without the first label of a causal model."""
        self.targets(split)
        pair = self.parts[split].taken(rows)
        if isinstance(self.model, _NextTokens):
            return self.model.shifted(pair, self.data["name"])
        return pair

    def samples(
        self, split: str, num_samples: int | None, seed: int, *, balanced: bool = True
    ) -> Pair:
        """Some samples of a split: class-balanced, or at random without classes.

        Of a file these alone are read into memory.
        """
        targets = self.targets(split)
        if num_samples is None or num_samples == len(targets):
            return self.part(split)
        if balanced and has_classes(targets):
            return self._taken(split, class_balanced(targets, num_samples, seed))
        return self._taken(split, at_random(len(targets), num_samples, seed))

    def usual_number(self, split: str) -> int | None:
        """1000 samples, or as many balanced ones as there are; None for all."""
        targets = self.targets(split)
        most = len(targets)
        if has_classes(targets):
            sizes = torch.bincount(targets)
            most = min(most, int(sizes[sizes > 0].min()) * int((sizes > 0).sum()))
        return None if len(targets) <= USUAL_SAMPLES else min(USUAL_SAMPLES, most)


def load_checkpoint(
    path: str | Path,
    *,
    network: str | None = None,
    state: str | None = None,
    data: str | None = None,
    loss: str | None = None,
    data_dir: str | Path | None = None,
) -> LoadedCheckpoint:
    """A checkpoint with its network and data.

    One that sharpness has written knows both. Any other needs `network`, which is asked
    for a module, and `data`; its file may hold a state dict, alone or under the usual
    names. Nothing in a checkpoint is executed; factories are the caller's own code.

    Args:
        path: a `.pt`, `.pth`, `.bin` or `.safetensors` file, the index of several, or a
            folder with one, such as `save_pretrained` writes; or the name of a model in
            Hugging Face's local cache.
        network: `package.module:factory` or `file.py:factory`, with arguments as in
            `?depth=20&width=16`; `timm:resnet18?num_classes=10`; or
            `transformers:FOLDER`, a folder with the configuration of a classifier (of
            sequences, tokens, images, sound), a masked or a causal language model; the
            checkpoint's own folder is known without it.
        state: name of a state dict, where the file holds several.
        data: a set of `lab.named.DATA`; an `.npz` file with x and y (or x_train,
            y_train, x_test, y_test); a `.csv` or `.parquet` table or a folder of
            `datasets` (`risk.files.read`); for a causal model a text file; or a factory
            that returns a pair (inputs, targets), a list of such batches, a loader or a
            data set, or a dict of these by split.
        loss: `cross-entropy`, `mse`, or a factory; None goes by the targets' type.
        data_dir: where the files of named sets lie.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no checkpoint or would run code, a factory that is not
            there or does not fit, parameters of another network, missing data.
    """
    saved, name, model, done = _of_checkpoint(path, network, state)
    network_is_theirs = network is not None or name.startswith("transformers:")
    source: Any = data or saved.data.get("name")
    ensure(
        source is not None,
        "--data",
        f"say what `{path}` is measured on",
        "none",
        f"Give a named set ({', '.join(DATA)}), an .npz file, or {_SPEC}.",
    )
    parts, about = _made_data(source, data_dir, model, done, as_trained=not data)
    ensure(
        bool(data) or saved.data.get("sha256") in (None, about.get("sha256")),
        path,
        f"have been trained on this {source}",
        "a checkpoint of other data with that name (sha256 differs)",
        "Point --data-dir at it.",
    )
    kept = ("batch_size", "seed", "learning_rate", "optimizer", "epoch", "metrics")
    training = {key: saved.training.get(key) for key in kept} if saved.training else None
    subject = LoadedCheckpoint(
        path=str(path),
        network_name=name,
        model=model.eval(),
        parts=parts,
        loss=_made_loss(loss or _usual_loss(model, parts["train"].targets)),
        data={**about, "loss": loss},
        start=None if network_is_theirs else _start(saved),
        facts={
            "path": str(path),
            "sha256": saved.sha256,
            "network": saved.network or {"name": name},
            "start": saved.start,
            "training": training or training_facts(saved.optimizer) or {},
            "notes": list(filter(None, done)),
        },
        notes=tuple(filter(None, done)),
    )
    _check_fit(subject, source)
    return subject


def _of_checkpoint(
    path: str | Path, network: str | None, state: str | None
) -> tuple[Checkpoint, str, nn.Module, list[str]]:
    """What the file holds, the network's name, the network, and what was done to fit it."""
    saved = checkpoint.load_any(path, state)
    if network is None and (checkpoint.located(path) / "config.json").is_file():
        network = f"transformers:{path}"
    name: Any = network or saved.network.get("name")
    ensure(
        name is not None,
        "--network",
        f"say what `{path}` is a checkpoint of",
        "none, and the file was not written by sharpness",
        f"Give {_SPEC}.",
    )
    model = made_network(network) if network else networks.build(saved.network)
    unread = ", ".join(saved.unread[:3]) + (", …" if len(saved.unread) > 3 else "")
    done = [_load_parameters(model, saved.state_dict, path, name)]
    done += [f"not read, since they are no tensors: {unread}"] if unread else []
    return saved, name, model, done


def _check_fit(subject: LoadedCheckpoint, source: str) -> None:
    """Try two samples: what does not fit should fail here, in one line."""
    first = torch.arange(min(2, len(subject.targets("train"))))
    inputs, targets = as_type(subject._taken("train", first), subject.dtype)
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


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """A starting point with the data to train it on, which may lie on disk."""

    model: nn.Module
    loss: Any
    train: Any = field(repr=False)  # a pair, a data set, or what a factory gave
    validation: Any = field(repr=False)  # likewise; None where there is none
    facts: dict[str, Any]  # what a record says of network and data
    notes: tuple[str, ...] = ()


def load_trainable(
    path: str | Path | None = None,
    *,
    network: str | None = None,
    state: str | None = None,
    data: str | None = None,
    loss: str | None = None,
    data_dir: str | Path | None = None,
    seed: int = 0,
) -> Trainable:
    """A network to be trained on, from a checkpoint or as its factory makes it.

    Unlike `load_checkpoint` it leaves data where they lie: what a factory returns is taken
    as it is, and arrays and tables stay on disk, so that they are read a batch at a time.

    Args:
        path: a checkpoint, as in `load_checkpoint`; None for the network as it is made.
        network: as there; without a checkpoint also one of `lab.named.NETWORKS`, with
            the sizes that the data ask for.
        state: as there.
        data: as there.
        loss: as there.
        data_dir: as there.
        seed: of a network's parameters, where there is no checkpoint.

    Raises:
        FileNotFoundError, ValueError: as there; or neither path nor network.
    """
    ensure(bool(path or network), "--network", "be given without a checkpoint", "none")
    saved, name, model = None, str(network), None
    done: list[str] = []
    if path is not None:
        saved, name, model, done = _of_checkpoint(path, network, state)
    source: Any = data or (saved.data.get("name") if saved else None)
    ensure(source is not None, "--data", "say what to train on", "none")
    if ":" in source and not source.endswith((".npz", ".csv", ".parquet")):
        made = _called("--data", source, _factory("--data", source))
        splits = made if isinstance(made, Mapping) and "train" in made else {"train": made}
        about = {"name": source}
    elif data and files.is_file(source) and not files.is_data_set(source):
        with _of_the_flag(source):
            splits, about = files.parts_on_disk(source), {"name": source}
        done += files.notes(source)
    else:
        parts, about = _made_data(
            source, data_dir, model or nn.Identity(), done, as_trained=not data
        )
        splits = {split: part.taken(None) for split, part in parts.items()}
    first = _first_row(splits["train"])
    if model is None:
        with random_generators_kept(seed):
            model = _fresh(name, first, splits["train"], seed)
    return Trainable(
        model=model,
        loss=_made_loss(loss or _usual_loss(model, first[1])),
        train=splits["train"],
        validation=splits.get("test", splits.get("validation")),
        facts={
            "path": None if path is None else str(path),
            "sha256": saved.sha256 if saved else None,
            "network": name,
            "data": {**about, "loss": loss},
        },
        notes=tuple(filter(None, done)),
    )


def _first_row(data: Any) -> Pair:
    """The first row, or batch, of whatever data there are."""
    if batches.is_pair(data):
        return cast(Pair, tree_map(lambda part: _tensor_of(part[:1]), data))
    row = data[0] if hasattr(data, "__getitem__") else next(iter(data))
    inputs, targets = as_pair(row)
    return tree_map(torch.as_tensor, inputs), torch.as_tensor(targets)


def _tensor_of(part: Any) -> Tensor:
    """A copy, since rows of a file cannot be written to."""
    return part if isinstance(part, Tensor) else torch.tensor(batches.native(part))


def _fresh(name: str, first: Pair, data: Any, seed: int) -> nn.Module:
    """A network with new parameters: one of the lab's, or what a factory makes."""
    if ":" in name:
        return made_network(name)
    head, given = parsed(name)
    inputs, targets = first
    num_classes = None
    if not targets.is_floating_point():
        ensure(batches.is_pair(data), "--network", "be a factory for such data", repr(name))
        num_classes = int(data[1].max()) + 1
    fitted = networks.arguments_for(
        head, inputs.shape[1:], num_classes, targets.shape[1:] or torch.Size([1])
    )
    model = networks.build({"name": head, "arguments": {**fitted, **given}})
    networks.initialise(model, seed)
    return model


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
        model = _of_transformers(spec, rest)
    else:
        model = _called("--network", spec, _factory("--network", spec))
    got = f"{type(model).__name__} from {spec}"
    sound = isinstance(model, nn.Module)
    ensure(sound, "--network", "make a torch.nn.Module", got, "Return the module.")
    return cast(nn.Module, model)


class _Logits(nn.Module):
    """A classifier of Hugging Face: its logits (N, C); (N,) where it has one output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        found = self.model(*args, **kwargs).logits
        return cast(Tensor, found.squeeze(1) if found.shape[1:] == (1,) else found)


class _EachToken(_Logits):
    """A model that scores every token: (N, C, T), as PyTorch's losses take them."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return cast(Tensor, self.model(*args, **kwargs).logits.transpose(1, 2))


class _NextTokens(_EachToken):
    """A causal language model that returns scores (N, V, T - 1) of tokens 2 to T."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)[:, :, :-1]

    @staticmethod
    def shifted(pair: Pair, source: str) -> Pair:
        """Labels (N, T) as transformers has them, without the first: (N, T - 1)."""
        inputs, labels = pair
        tokens = inputs["input_ids"] if isinstance(inputs, dict) else inputs
        sound = isinstance(tokens, Tensor) and labels.shape == tokens.shape
        sound = sound and labels.ndim == 2 and not labels.is_floating_point()
        contract = "give labels (N, T) for a causal model, the tokens themselves"
        ensure(sound, "--data", contract, f"{tuple(labels.shape)} from {source}")
        moved = torch.equal(labels[:, :-1], tokens[:, 1:]) and not labels.equal(tokens)
        got = f"labels from {source} that were moved by one already"
        ensure(not moved, "--data", contract, got, "They are moved here.")
        return inputs, labels[:, 1:]


# Ends of the names of transformers' classes, and what makes a tensor of their outputs.
_HEADS: dict[str, type[_Logits]] = {
    "ForSequenceClassification": _Logits,
    "ForImageClassification": _Logits,
    "ForAudioClassification": _Logits,
    "ForVideoClassification": _Logits,
    "ForMultipleChoice": _Logits,
    "ForTokenClassification": _EachToken,
    "ForMaskedLM": _EachToken,
    "ForCausalLM": _NextTokens,
    "LMHeadModel": _NextTokens,
}


def _of_transformers(spec: str, folder: str) -> nn.Module:
    transformers = _package("transformers", spec)
    contract = "name a folder with config.json of a classifier, a masked or a causal LM"
    place = str(checkpoint.located(folder))
    there = Path(place, "config.json").is_file()
    ensure(there, "--network", contract, repr(folder), "Save it with `save_pretrained`.")
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with explained("--network", contract, repr(folder)):
        config = transformers.AutoConfig.from_pretrained(place, **local)
    name = (config.architectures or ["AutoModelForSequenceClassification"])[0]
    kind = next((kind for end, kind in _HEADS.items() if name.endswith(end)), None)
    advice = "Write a factory that returns its logits."
    ensure(kind is not None, "--network", contract, name, advice)
    got = f"{name}, which this version of transformers has not"
    made: Any = getattr(transformers, name, None)
    ensure(made is not None, "--network", contract, got, advice)
    with explained("--network", "make its network", repr(folder)):
        build = made.from_config if name.startswith("Auto") else made
        return cast(type[_Logits], kind)(build(config))


def _usual_loss(model: nn.Module, targets: Tensor) -> str:
    """By the targets; of a classifier with several labels a row by its configuration."""
    config = getattr(getattr(model, "model", None), "config", None)
    if getattr(config, "problem_type", None) == "multi_label_classification":
        return "bce_with_logits"
    return "mse" if targets.is_floating_point() else "cross-entropy"


def _load_parameters(
    model: nn.Module, state: Mapping[str, Tensor], path: str | Path, name: str
) -> str:
    """Put them in; returns what was done for that, in one line."""
    ensure(
        not any(isinstance(p, UninitializedParameter) for p in model.parameters()),
        "--network",
        "make a network with all its parameters",
        f"{name}, which waits for a first batch (lazy layers)",
        "Run it on one in the factory.",
    )
    theirs, done = state_dicts.matched(state, model, path, name)
    kinds = {value.dtype for value in theirs.values() if value.is_floating_point()}
    if kinds == {torch.float64}:
        model.double()  # a factory makes float32; loading would round
    mine = model.state_dict()
    lost = [k for k, v in theirs.items() if v.is_complex() and not mine[k].is_complex()]
    got = f"complex ones, first {lost[0] if lost else None}"
    ensure(not lost, path, f"hold the real parameters of {name}", got)
    model.load_state_dict(theirs, strict=False)
    return done


def _start(saved: Checkpoint) -> Tensor | None:
    """The parameters a training of ours began with, if they can be made again."""
    fresh = networks.build(saved.network)
    networks.initialise(fresh, int(saved.start.get("seed", 0)))
    if networks.digest(fresh) != saved.start.get("sha256"):
        return None
    return _tensors.flatten(p.detach() for p in fresh.parameters())


# -- data ------------------------------------------------------------------------------


def _made_data(
    source: str,
    data_dir: str | Path | None,
    model: nn.Module,
    done: list[str],
    *,
    as_trained: bool,
) -> tuple[dict[str, Samples], dict[str, Any]]:
    """The parts, and what a record says of them; `as_trained` scales bytes."""
    if files.is_file(source) and not as_trained:
        found = _of_file(source)
        done += files.notes(source)
        return found, {"name": source}
    splits, about = _pairs(source, data_dir, model, done, as_trained)
    for pair in splits.values():
        _check_lengths(pair, source)
    return {split: Samples.held(pair) for split, pair in splits.items()}, about


def _of_file(source: str) -> dict[str, Samples]:
    """Its parts: the targets are read now, the inputs when they are taken."""
    with _of_the_flag(source):
        if files.is_data_set(source):
            return {
                split: Samples(_targets(files.targets_of(stored)), _reader(source, stored))
                for split, stored in files.data_sets(source).items()
            }
        return {
            split: Samples(
                _targets(torch.tensor(batches.native(y))), _reader(source, (x, y))
            )
            for split, (x, y) in files.parts_on_disk(source).items()
        }


def _reader(source: str, stored: Any) -> Callable[[Tensor | None], Pair]:
    """What reads rows of a data set, or of a pair of arrays, into memory."""

    def read(rows: Tensor | None) -> Pair:
        if not isinstance(stored, tuple):
            return _as_pair(files.samples_at(stored, rows), source)
        x, y = stored if rows is None else (part[rows.numpy()] for part in stored)
        ((inputs, targets),) = _read([(x, y)], source)
        return inputs, _targets(targets)

    return read


def _pairs(
    source: str,
    data_dir: str | Path | None,
    model: nn.Module,
    done: list[str],
    as_trained: bool,
) -> tuple[dict[str, Pair], dict[str, Any]]:
    """A text, a named set, or what a factory returns."""
    if Path(source.partition("?")[0]).is_file():
        is_causal, contract = isinstance(model, _NextTokens), "be data with labels"
        got = f"a {Path(source).suffix or 'plain'} file"
        advice = "Take .npz, .csv, .parquet or a factory; text is for causal models."
        ensure(is_causal, f"--data {source}", contract, got, advice)
        text = _from_text(source, cast(_NextTokens, model), done)
        return {"train": text}, {"name": source}
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


def _from_text(source: str, model: _NextTokens, done: list[str]) -> Pair:
    """Blocks (N, T) of a text file's tokens, as inputs and as labels."""
    path, arguments = parsed(source)
    config: Any = model.model.config
    length = int(arguments.get("length", min(128, config.max_position_embeddings)))
    tokenizer = _tokenizer(Path(config.name_or_path or "."))
    content = Path(path).read_bytes()
    if tokenizer is None:
        ensure(
            config.vocab_size >= 256,
            "--data",
            "be tokens for a vocabulary of less than 256",
            f"{path}, and there is no tokenizer beside the checkpoint",
            "Save one there, or pass a factory.",
        )
        numbers = list(content)
    else:
        numbers = tokenizer(content.decode())["input_ids"]
    tokens = torch.tensor(numbers)
    num = len(tokens) // length
    got = f"{len(tokens)} in {path}"
    ensure(num > 0 and length > 1, "--data", f"hold at least {length} tokens", got)
    kind = "bytes, for want of a tokenizer" if tokenizer is None else "tokens"
    done.append(f"text: {num} blocks of {length} {kind}")
    blocks = tokens[: num * length].view(num, length)
    return blocks, blocks


def _tokenizer(folder: Path) -> Any:
    """The tokenizer that a folder holds, if it holds one; its files are data, not code."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return None
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with explained("--data", "have a tokenizer that loads", str(folder)):
        return _package("transformers", str(folder)).AutoTokenizer.from_pretrained(
            folder, **local
        )


_named_set = lru_cache(maxsize=1)(lab_data.load)  # many checkpoints of one set are usual


def _targets(y: Tensor) -> Tensor:
    return y if y.is_floating_point() else y.long()


def _as_pair(made: Any, source: str) -> Pair:
    """A pair as it is; batches and loaders joined into one."""
    if isinstance(made, tuple | list) and len(made) == 2 and isinstance(made[1], Tensor):
        return _plain(made[0]), made[1]
    if isinstance(made, tuple | list):
        parts = [as_pair(part) for part in made]
    else:
        parts = _read(made, source)
    paired = all(
        isinstance(part, tuple | list) and len(part) == 2 and isinstance(part[1], Tensor)
        for part in parts
    )
    contract = "give a pair (inputs, targets), a list of such batches, or a loader"
    got = f"{type(made).__name__} from {source}"
    ensure(bool(parts) and paired, "--data", contract, got)
    pairs = [(_plain(inputs), targets) for inputs, targets in parts]
    for pair in pairs:
        _check_lengths(pair, source)
    return cast(Pair, tree_map(lambda *several: torch.cat(several), *pairs))


def _read(made: Any, source: str) -> list[Any]:
    """The batches of a loader, a file or a data set."""
    with _of_the_flag(source):
        return intake.batches_of(made, torch.device("cpu"), pairs=True)


@contextmanager
def _of_the_flag(source: str) -> Iterator[None]:
    """A line about `data`, or a file by its name, names what stood behind `--data`."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        text = str(error)
        for name in ("data", source, source.partition("?")[0]):
            text = text.replace(f"`{name}`", f"`--data {source}`", 1)
        raise ValueError(text) from error
    except Exception as error:  # of the caller's own code
        first = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(
            f"`--data {source}` must give its batches; got {type(error).__name__}: {first}"
        ) from error


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


def _made_loss(spec: str) -> nn.Module:
    if ":" not in spec:
        try:
            return cast(nn.Module, intake.made_loss(spec))
        except (ValueError, TypeError) as error:
            raise ValueError(str(error).replace("`loss`", "`--loss`")) from None
    factory = _factory("--loss", spec)
    made = factory if _takes_two(factory) else _called("--loss", spec, factory)
    got = f"{type(made).__name__} from {spec}"
    ensure(callable(made), "--loss", "make a loss to be called", got)
    return cast(nn.Module, made)


def _takes_two(factory: Callable[..., Any]) -> bool:
    """Whether a function is a loss of (outputs, targets) itself, and makes none."""
    try:
        signature = inspect.signature(factory)
        signature.bind(None, None)
    except (TypeError, ValueError):
        return False
    required = [p for p in signature.parameters.values() if p.default is p.empty]
    return sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in required) == 2


# -- factories -------------------------------------------------------------------------


def _factory(flag: str, spec: str) -> Callable[[], Any]:
    """The callable that `package.module:factory?arguments` names, arguments filled in."""
    head, mark, query = spec.partition("?")
    where, colon, name = head.rpartition(":")
    arguments = parsed(f"{name}{mark}{query}")[1]
    ensure(bool(where and colon and name), flag, f"be {_SPEC}", repr(spec))
    module = _module(flag, where)
    factory: Any = getattr(module, name, None)
    what = f"is a {type(factory).__name__}" if hasattr(module, name) else "is not there"
    contract = f"name a function or class of {where}"
    advice = f"Write `def {name}(): return ...`."
    sound = callable(factory) and not isinstance(factory, nn.Module)
    ensure(sound, flag, contract, f"{name!r}, which {what}", advice)
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
