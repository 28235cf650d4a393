"""Names in a state dict: those of wrappers, old ones, and what a network can do without.

One table of names that mean the same, applied to both sides; then the tensors of the
network are looked for under one prefix. What was done is said.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sharpness._arguments import ensure

_WRAPPERS = "module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
_RENAMED = (
    (re.compile(rf"(?<![^.])(?:{_WRAPPERS})\."), ""),
    (re.compile(r"(?<![^.])weight_g$"), "parametrizations.weight.original0"),
    (re.compile(r"(?<![^.])weight_v$"), "parametrizations.weight.original1"),
    (re.compile(r"LayerNorm\.gamma$"), "LayerNorm.weight"),  # BERT of 2018
    (re.compile(r"LayerNorm\.beta$"), "LayerNorm.bias"),
)
# The network's own will do: counters that evaluation does not read, positions 0, 1, ...
_OWN = re.compile(r"(?<![^.])(?:num_batches_tracked|position_ids|_extra_state)$")
# No parameters: counters, the triangular masks of old GPT-2 files, a loss's weights.
_SPARE = re.compile(
    r"(?<![^.])(?:num_batches_tracked|position_ids|_extra_state|n_averaged|masked_bias|"
    r"attn\.bias|rotary_emb\.inv_freq|total_ops|total_params)$"
    r"|^(?:criterion|loss|loss_fn|loss_func|loss_function|metrics?)\."
)


def plain(name: str) -> str:
    """A name without wrappers, in today's spelling."""
    for pattern, other in _RENAMED:
        name = pattern.sub(other, name)
    return name


def matched(
    state: Mapping[str, Tensor], model: nn.Module, path: object, network: str
) -> tuple[dict[str, Tensor], str]:
    """The tensors of `state` under the names of `model`, and what was done to find them.

    Args:
        state: somebody's state dict.
        model: the network they are for.
        path: of the file, for the error message.
        network: its name, likewise.

    Raises:
        ValueError: tensors are missing, too many or of other shapes; or there are several
            of each, under different prefixes.
    """
    mine = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    if {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in mine.items()}:
        return dict(state), ""
    ours = _by_plain_name(mine)
    plain_state = {name: state[key] for name, key in _by_plain_name(state).items()}
    theirs, folded = _folded(plain_state, ours)
    tied = _tied(mine)
    shapes = {name: mine[key].shape for name, key in ours.items()}
    tries = {
        prefix: _lacking(theirs, prefix, shapes, tied) for prefix in _prefixes(theirs, ours)
    }
    fitting = [prefix for prefix, lacking in tries.items() if not lacking]
    ensure(
        len(fitting) < 2 or "" in fitting,
        path,
        f"hold {network} once",
        f"it under {' and '.join(map(repr, fitting))}",
        "Say which with --state.",
    )
    prefix = min(tries, key=lambda p: (len(tries[p]), len(p)))
    inside = {name: _inside(name, prefix) for name in theirs}
    spare = [k for k, name in inside.items() if name not in ours]
    extra = [k for k in spare if inside[k] is not None and not _is_spare(k, theirs[k])]
    wrong = [*tries[prefix], *extra]
    first = wrong[0] if wrong else ""
    there = {name: value.shape for name, value in theirs.items()}
    there |= {name: there[k] for k, name in inside.items() if name in shapes}
    sides = f"{_size(there.get(first))} in the file, {_size(shapes.get(first))} wanted"
    if first not in there:
        sides += f"; the file begins with {next(iter(state), 'nothing')}"
    adapted = any("lora_" in name for name in extra)
    merge = "Merge the adapter first: `model.merge_and_unload()`."
    ensure(
        not wrong,
        path,
        f"hold the parameters of {network}",
        f"others: {len(wrong)} tensors differ, first {first} ({sides})",
        merge if adapted else "Name the network it was trained with.",
    )
    found = {ours[n]: theirs[k] for k, n in inside.items() if n is not None and n in ours}
    absent = sorted(set(mine) - set(found))
    return found, _said(prefix, state, spare, absent, folded)


def _said(
    prefix: str,
    state: Mapping[str, Tensor],
    spare: list[str],
    absent: list[str],
    folded: bool,
) -> str:
    """One line on what was done."""
    wrappers = {w for k in state for w in re.findall(rf"(?<![^.])(?:{_WRAPPERS})\.", k)}
    taken = [*sorted(wrappers), *([prefix] if prefix and prefix[0] != "+" else [])]
    parts = (
        f"{', '.join(taken)} taken off the names" if taken else "",
        f"left out: {_few(spare)}" if spare else "",
        f"not in the file, the network's own or tied: {_few(absent)}" if absent else "",
        "weight norm or masks folded into the weights" if folded else "",
    )
    return "; ".join(part for part in parts if part)


def _size(shape: torch.Size | None) -> str:
    return "none" if shape is None else str(tuple(shape))


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def _by_plain_name(names: Mapping[str, Tensor]) -> dict[str, str]:
    """Plain names and the names they come from; where two would be one, names as are."""
    found = {plain(name): name for name in names}
    return found if len(found) == len(names) else {name: name for name in names}


def _inside(name: str, prefix: str) -> str | None:
    """A name without the prefix; None where it has another. `+` adds instead."""
    if prefix.startswith("+"):
        return prefix[1:] + name
    return name.removeprefix(prefix) if name.startswith(prefix) else None


def _prefixes(theirs: Mapping[str, Tensor], ours: Mapping[str, str]) -> list[str]:
    """Prefixes under which some of our tensors are; `+p.` where ours has one more."""
    ends = {f".{name}" for name in ours}
    found = {
        name[: i + 1]
        for name in theirs
        for i in range(len(name))
        if name[i] == "." and name[i:] in ends
    }
    first = {name.partition(".")[0] for name in ours}
    more = {f"+{part}." for part in first if len(first) == 1}
    return sorted({"", *found, *more})


def _lacking(
    theirs: Mapping[str, Tensor],
    prefix: str,
    shapes: Mapping[str, torch.Size],
    tied: Mapping[str, set[str]],
) -> list[str]:
    """Names of ours that have no tensor of their shape there, and need one."""
    there = {_inside(name, prefix): value.shape for name, value in theirs.items()}

    def sound(name: str, shape: torch.Size) -> bool:
        if name in there:
            return there[name] == shape
        return bool(_OWN.search(name)) or any(n in there for n in tied.get(name, ()))

    return [name for name, shape in shapes.items() if not sound(name, shape)]


def _tied(mine: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """Names that are one tensor: a safetensors file holds it under one of them only."""
    groups: dict[object, set[str]] = {}
    for name, value in mine.items():
        if value.numel():
            key = (value.data_ptr(), value.shape, value.stride())
            groups.setdefault(key, set()).add(plain(name))
    return {name: group - {name} for group in groups.values() for name in group}


def _is_spare(name: str, value: Tensor) -> bool:
    is_mask = not name.endswith("attn.bias") or value.ndim == 4
    return bool(_SPARE.search(name)) and is_mask


def _folded(
    theirs: Mapping[str, Tensor], ours: Mapping[str, str]
) -> tuple[dict[str, Tensor], bool]:
    """Weights of weight norm, g v / |v|, and pruned ones, where the network has neither."""
    end = ".parametrizations.weight.original"
    parts = (end, "_orig", "_mask")
    if any(part in f".{name}" for name in ours for part in parts):
        return dict(theirs), False
    found = {name: value for name, value in theirs.items() if end not in f".{name}"}
    for name in theirs:
        head = name.removesuffix("_mask")
        if head != name and f"{head}_orig" in theirs:
            found[head] = found.pop(f"{head}_orig") * found.pop(name)
        if f".{name}".endswith(f"{end}0"):
            head = name.removesuffix("parametrizations.weight.original0")
            g, v = theirs[name], theirs[f"{head}parametrizations.weight.original1"]
            dim = next((d for d, size in enumerate(g.shape) if size > 1), 0)
            found[f"{head}weight"] = torch._weight_norm(v, g, dim)
    return found, len(found) < len(theirs)
