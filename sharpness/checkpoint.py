"""Model files, ours and anybody's: the only reader, and the only writer.

A `.pt` file is read with `weights_only=True`, so nothing in it is ever executed; a
`.safetensors` file carries the same facts as JSON in its header. Which of them a file is
is told by its bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from sharpness import foreign_files
from sharpness._arguments import ensure, explained
from sharpness._saving import write

FORMAT, SCHEMA = "sharpness-checkpoint", 1


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trained network: parameters and buffers, and how they came about."""

    state_dict: dict[str, Tensor] = field(repr=False)
    network: dict[str, Any]  # name and arguments, resolved by `sharpness.lab`
    data: dict[str, Any]  # name, split sizes, sha256
    training: dict[str, Any]  # config, epoch, history, metrics
    start: dict[str, Any]  # seed and sha256 of the initial parameters
    optimizer: dict[str, Any] = field(repr=False, default_factory=dict)
    progress: dict[str, Any] = field(repr=False, default_factory=dict)  # to carry on from
    sha256: str = ""  # of the file it was read from
    unread: tuple[str, ...] = ()  # classes whose objects were passed over


FIELDS = ("state_dict", "network", "data", "training", "start")


def save(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write to a temporary name in the same folder, then rename: never half a file."""
    path = Path(path)
    facts = {"format": FORMAT, "schema": SCHEMA, **asdict(checkpoint)}
    del facts["sha256"], facts["unread"]
    written = _safetensors_content if path.suffix == ".safetensors" else _pt_content
    write(path, written(path, facts))


def remove_leftovers(path: str | Path) -> None:
    """Delete temporary files of this checkpoint that killed processes have left."""
    path = Path(path)
    name = re.compile(rf"\.{re.escape(path.stem)}(-epoch\d+)?{re.escape(path.suffix)}\.\d+")
    for file in path.parent.iterdir():
        if name.fullmatch(file.name):
            file.unlink(missing_ok=True)


def _pt_content(path: Path, facts: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    torch.save(facts, stream)
    _read_pt(path, stream.getvalue())  # what could not be read again is not written
    return stream.getvalue()


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a checkpoint, is damaged, would run code, or was written
            by something else. One line each, saying what to do.
    """
    return _checkpoint(Path(path), *_read(Path(path)))


def load_any(path: str | Path, state: str | None = None) -> Checkpoint:
    """A checkpoint of ours, or anybody's parameters: alone, or under a name in the file.

    Where somebody else has written the file, `network`, `data`, `training` and `start`
    are empty, and `optimizer` is the first that the file holds; objects beside the
    tensors, such as the `argparse.Namespace` of a training script, are passed over and
    named in `unread`.

    Args:
        path: a file, an index of several (`*.index.json`), or a folder with one of these.
        state: which state dict, where a file holds several: its name, or the first part of
            its tensors' names; `a.b` for one inside of another.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, would run code, is of another schema, holds no tensors
            by name or quantised ones, or several state dicts and `state` names none.
    """
    place = weights_of(path)
    unread: list[str] = []
    if place.suffix == ".json":
        facts, digest = _read_index(place)
    else:
        facts, digest = _read(place, unread)
    if isinstance(facts, dict) and facts.get("format") == FORMAT and state is None:
        return _checkpoint(place, facts, digest)
    found = _state_in(place, facts, state, unread)
    return Checkpoint(
        state_dict=found,
        network={},
        data={},
        training={},
        start={},
        optimizer=_optimizer_in(facts),
        sha256=digest,
        unread=tuple(unread),
    )


def _optimizer_in(facts: Any) -> dict[str, Any]:
    """The first `state_dict` of an optimizer in somebody's file; empty without one."""
    there = facts.values() if isinstance(facts, dict) else ()
    listed = [part for value in there for part in _several(value)]  # Lightning's is a list
    for part in listed:
        groups = part.get("param_groups") if isinstance(part, dict) else None
        if isinstance(groups, list) and all(isinstance(group, dict) for group in groups):
            return dict(part)
    return {}


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _state_in(
    path: Path, facts: Any, asked: str | None, unread: Sequence[str]
) -> dict[str, Tensor]:
    """The tensors by name: of the one state dict, or of the one that is asked for."""
    there = facts if isinstance(facts, dict) else {}
    several = {str(k): v for k, v in there.items() if _is_state(v)}
    inner = {} if _is_state(there) else dict(_inner(there))
    alike = [set(state) for state in several.values()]  # such as the means of a network
    several |= {k: v for k, v in inner.items() if not alike or set(v) in alike}
    several = several or {"": there}
    if asked is None:
        first, chosen = next(iter(several.items()))
        ensure(
            len(several) == 1,
            path,
            "hold one state_dict",
            f"several: {', '.join(several)}",
            f"Say which: --state {first}.",
        )
    else:
        chosen = there
        for part in asked.split("."):
            chosen = _under(chosen, part) if isinstance(chosen, dict) else None
        has = ", ".join(filter(None, several)) or ", ".join(map(str, there))
        got = f"{asked!r}, which is none (it has {has})"
        ensure(_is_state(chosen), "--state", f"name a state_dict of {path}", got)
    narrow = next((str(k) for k, v in chosen.items() if _is_quantised(str(k), v)), None)
    ensure(
        narrow is None,
        path,
        "hold floating-point tensors",
        f"quantised ones, first {narrow}",
        "Save the network it was quantised from.",
    )
    state = {str(k): v.to_dense() for k, v in chosen.items() if isinstance(v, Tensor)}
    absent = next((name for name, value in state.items() if value.is_meta), None)
    got = f"none, on the device 'meta', first {absent}"
    ensure(absent is None, path, "hold values", got, "Save it once it is materialised.")
    if unread and not state:
        raise _pickled(path, unread[0])
    ensure(
        bool(state),
        path,
        "hold a state_dict",
        _described(facts),
        "Save `model.state_dict()`, alone or under the name 'state_dict'.",
    )
    return state


def _inner(facts: dict[Any, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    """State dicts further inside, by the way to them; none of an optimizer's."""
    for key, value in facts.items():
        if isinstance(value, dict) and isinstance(key, str) and "optim" not in key:
            name = f"{head}{key}"
            yield from [(name, value)] if _is_state(value) else _inner(value, f"{name}.")


def _under(facts: dict[Any, Any], part: str) -> Any:
    """What has that name, or the tensors whose names begin with it and a dot."""
    head, named = f"{part}.", {str(k): v for k, v in facts.items()}  # folds are numbers
    some = {k[len(head) :]: v for k, v in named.items() if k.startswith(head)}
    return named.get(part, some)


def _is_quantised(name: str, value: Any) -> bool:
    """8 or 4 bits an entry, packed into whole numbers or not."""
    if not isinstance(value, Tensor):
        return "_packed_params" in name
    floating = value.is_floating_point() or value.is_complex()
    narrow = name.endswith("weight") and (not floating or value.element_size() == 1)
    return narrow or value.dtype == torch.int8 or value.is_quantized


def _is_state(value: Any) -> bool:
    """Whether these are parameters by name: no optimizer's, no random generator's."""
    return isinstance(value, dict) and any(
        isinstance(v, Tensor) and v.ndim and (v.is_floating_point() or v.is_quantized)
        for v in value.values()
    )


_WEIGHTS = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")


def located(path: str | Path) -> Path:
    """The path itself; of a model's name, its folder in Hugging Face's local cache.

    Nothing is downloaded: a name that is not in the cache stays a path that is not there.
    """
    place = Path(path)
    if place.exists() or not _is_name(path):
        return place
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return place
    found = try_to_load_from_cache(str(path), "config.json")
    return Path(found).parent if isinstance(found, str) else place


def _is_name(path: str | Path) -> bool:
    """Whether this may be a model's name, such as gpt2 or openai-community/gpt2."""
    named = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path))
    return bool(named) and Path(path).suffix not in (*_SUFFIXES, ".json")


def weights_of(path: str | Path) -> Path:
    """The file with the tensors: the path itself, or what a folder holds.

    Raises:
        ValueError: a folder without one, or with several.
    """
    place = located(path)
    if not place.is_dir():
        return place
    names = sorted(file.name for file in place.iterdir())
    files = [name for name in names if Path(name).suffix in _SUFFIXES]
    found = [name for name in _WEIGHTS if name in names][:1] or files
    other = None if set(found) & set(_WEIGHTS) else foreign_files.folder_of(names)
    if other:
        ensure(False, path, "hold one state_dict", *other)
    held = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    ensure(
        len(found) == 1,
        path,
        "be a checkpoint",
        f"a folder that holds {held or 'nothing'}, {'several' if files else 'no weights'}",
        "Name the file.",
    )
    return place / found[0]


def _read_index(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of all files that an index names, beside it; their digest."""
    check_file(path)
    with explained(
        path, 'be an index with a "weight_map" of files beside it', "something else"
    ):
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{outside[0]!r} lies elsewhere")
    parts = [_read(path.with_name(name)) for name in names]
    digest = hashlib.sha256("".join(digest for _, digest in parts).encode()).hexdigest()
    return {key: value for state, _ in parts for key, value in state.items()}, digest


def check_file(path: str | Path) -> None:
    """Refuse a path where no file is.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        if _is_name(path):
            raise FileNotFoundError(
                f"`{path}` must be a file, a folder or a model in Hugging Face's local "
                f"cache; got none of them. `hf download {path}` fetches a model once."
            )
        raise FileNotFoundError(
            f"`{path}` must be a checkpoint file; got no such file. Train one with "
            "`python -m sharpness.train`."
        )


def _checkpoint(path: Path, facts: Any, digest: str) -> Checkpoint:
    _check_facts(path, facts)
    known = {f.name: facts[f.name] for f in fields(Checkpoint) if f.name in facts}
    return Checkpoint(**{**known, "sha256": digest})


def _read(path: Path, unread: list[str] | None = None) -> tuple[Any, str]:
    """What a file holds, and its digest.

    Where there is a list, objects of classes are passed over, and it gets their names.
    """
    check_file(path)
    content = path.read_bytes()
    of_tensors = content[8:9] == b"{" or path.suffix == ".safetensors"
    if of_tensors and not content.startswith(b"PK"):
        facts = _read_safetensors(path, content)
    else:
        facts = _read_pt(path, content, unread)
    return facts, hashlib.sha256(content).hexdigest()


def _read_pt(path: Path, content: bytes, unread: list[str] | None = None) -> Any:
    skipped: list[str] = []
    with warnings.catch_warnings():  # about pickle protocols
        warnings.simplefilter("ignore")
        while True:  # every turn names one more class
            try:
                facts = _plain_values(content, [(_Inert, name) for name in skipped])
                break
            except Exception as error:  # a dozen kinds on damaged bytes
                blocked = _blocked_by(error) or foreign_files.first_global(content)
            if unread is None or blocked is None or blocked in skipped:
                raise _unreadable(path, content, skipped[0] if skipped else blocked)
            skipped.append(blocked)
    if unread is not None:
        unread += skipped
    return facts


def _blocked_by(error: Exception) -> str | None:
    """The class or function that PyTorch's reader has refused to take from a file."""
    found = re.search(r"(?:Unsupported global: |unsupported )GLOBAL (\S+)", str(error))
    return found[1] if found else None


def _plain_values(content: bytes, allowed: Sequence[Any] = ()) -> Any:
    with torch.serialization.safe_globals(list(allowed)):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


class _Inert(dict[Any, Any]):
    """Stands for an object of any class that a file names: takes all, does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


def _unreadable(path: Path, content: bytes, blocked: str | None) -> ValueError:
    kind = foreign_files.kind_of(content)
    if kind:
        return ValueError("`{}` must hold a state_dict; got {}. {}".format(path, *kind))
    if blocked:
        return _pickled(path, blocked)
    known = "a damaged or truncated file" if content[:2] == b"PK" else "another file"
    return ValueError(
        f"`{path}` must be a checkpoint written by torch.save; got {known} "
        f"({len(content)} bytes). Write it again, or pass the right file."
    )


def _pickled(path: Path, blocked: str) -> ValueError:
    if "quant" in blocked.lower():
        return ValueError(
            f"`{path}` must hold floating-point tensors; got quantised ones "
            f"(`{blocked}`). Save the network it was quantised from."
        )
    if "numpy" in blocked:
        return ValueError(
            f"`{path}` must hold tensors; got NumPy's (`{blocked}`). Save "
            "`torch.from_numpy(array)` of each, by name, with torch.save."
        )
    return ValueError(
        f"`{path}` must hold plain tensors and values; got a pickle that needs "
        f"`{blocked}`, which was not executed. Save the `state_dict` alone, not the "
        "whole module."
    )


def _check_facts(path: Path, facts: Any) -> None:
    advice = (
        "For your own model, load it in Python and pass it to "
        "`sharpness.EmpiricalRisk(model, loss, data)`."
    )
    ours = "be a checkpoint written by sharpness"
    ensure(
        isinstance(facts, dict) and facts.get("format") == FORMAT,
        path,
        ours,
        _described(facts),
        advice,
    )
    ensure(
        facts.get("schema") == SCHEMA,
        path,
        f"have schema {SCHEMA}",
        str(facts.get("schema")),
        "Read it with the version of sharpness that wrote it.",
    )
    missing = [name for name in FIELDS if name not in facts]
    ensure(not missing, path, ours, f"one without {', '.join(missing)}", advice)


def _described(facts: Any) -> str:
    names = ", ".join(map(str, list(facts)[:3])) if isinstance(facts, dict) else ""
    return f"{type(facts).__name__} ({names}, …)" if names else "something else"


def _safetensors_content(path: Path, facts: dict[str, Any]) -> bytes:
    tensors: dict[str, Tensor] = {}
    return safetensors.torch.save(
        tensors, metadata={FORMAT: json.dumps(_without_tensors(facts, tensors))}
    )


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` with each tensor moved to `tensors` and its number left in its place."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"__tensor__": name}
    if isinstance(value, dict):  # as pairs: keys may be whole numbers
        items = value.items()
        return {"__dict__": [[key, _without_tensors(v, tensors)] for key, v in items]}
    if isinstance(value, list | tuple):
        return [_without_tensors(item, tensors) for item in value]
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_with_tensors(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return tensors[value["__tensor__"]]
    return {key: _with_tensors(item, tensors) for key, item in value["__dict__"]}


def _read_safetensors(path: Path, content: bytes) -> Any:
    try:
        tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length]).get("__metadata__", {})
        if FORMAT not in header:
            return tensors
        return _with_tensors(json.loads(header[FORMAT]), tensors)
    except (SafetensorError, ValueError, KeyError, TypeError):
        if foreign_files.kind_of(content):
            raise _unreadable(path, content, None) from None
        raise ValueError(
            f"`{path}` must be a .safetensors file; got a damaged or other file "
            f"({len(content)} bytes). Write it again, or pass the right file."
        ) from None
