"""What is trained: a starting point, a loss, data and an optimizer, at any batch size."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import default_collate

from sharpness import _tensors
from sharpness._arguments import ensure, known, positive, whole
from sharpness.lab.ghost import use_ghost_batches
from sharpness.risk import batches, files, intake, loss_terms
from sharpness.risk.batches import Pair
from sharpness.risk.model_state import (
    deep_copy,
    original,
    random_generators_kept,
    unwrapped,
)
from sharpness.risk.objective import Objective, call_model

OptimizerFactory = Callable[[Iterable[nn.Parameter], float], Optimizer]
OPTIMIZERS: dict[str, OptimizerFactory] = {
    "sgd": SGD,
    "momentum": partial(SGD, momentum=0.9),
    "adam": Adam,
    "adamw": AdamW,
}
RULES = {"linear": 1.0, "sqrt": 0.5, "none": 0.0}  # power of the batch size in the rate
_FEW = 32  # rows on which model, loss and data are tried together
_MOST_VALIDATED = 4096
_GROUPS = 64  # of validation rows; the spread of their means gives the standard error
_AT_ONCE = 1 << 16  # rows of arrays, where all are looked through
_MOST_ORDERED = 1 << 27  # rows: their order takes a gigabyte


@dataclass(frozen=True, eq=False)
class Problem:
    """One starting point, loss, data and optimizer, ready to be trained from at any size.

    Args:
        model: the starting point. Never changed: deep copies are trained, all of their
            layers in training mode.
        loss: the mean over rows, as `EmpiricalRisk` takes it; also a name.
        data: training rows. A pair (inputs, targets) of tensors or arrays, of which the
            rows of a batch are read at a time, so that they may be memory-mapped; a
            map-style data set (`len`, indexing by a list of rows or by one row); a file
            or folder of `risk.files.mapped`, which stays on disk; anything else that
            `EmpiricalRisk` takes is read once into memory.
        lr: a learning rate that is known to work, > 0 ...
        batch_size: ... and the batch size that it works for, >= 1. They anchor the
            scaling rule.
        optimizer: "sgd", "momentum" (0.9), "adam", "adamw", or a function of parameters
            and learning rate, such as a class of `torch.optim`.
        validation: rows that tell how good a model is, as `data`; at most 4096 of them,
            drawn once, are looked at. None: as many of the training rows stand in.
        device: where to compute; None means where the parameters are.
        batchnorm_batch: rows that BatchNorm takes its statistics from in training (ghost
            batches), >= 2; None for the whole batch.

    Attributes:
        notes: what was changed, left out or stands out: rows with NaN, types, targets
            that are all the same.
        rule: how the rate is scaled by default: "linear" for SGD, "sqrt" else.

    Raises:
        ValueError: no row without NaN, an argument out of its range, or what
            `EmpiricalRisk` refuses of model, loss and data.
        TypeError: `optimizer` makes no optimizer.

    Cost: arrays are read once, for NaN; of a data set 4096 rows.
    """

    model: nn.Module
    loss: Any
    data: Any
    _: KW_ONLY
    lr: float
    batch_size: int
    optimizer: str | OptimizerFactory = "sgd"
    validation: Any = None
    device: Any = None
    batchnorm_batch: int | None = None
    notes: list[str] = field(init=False, default_factory=list)
    rule: str = field(init=False)
    _rows: _Rows = field(init=False, repr=False)
    _validated: Pair = field(init=False, repr=False)
    _taken: Callable[[Pair], Pair] = field(init=False, repr=False)
    _predicted: Callable[[Any], Any] = field(init=False, repr=False)
    _terms: loss_terms.LossTerms | None = field(init=False, repr=False)
    _criterion: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Try it on a few rows, and look through the data."""
        loss, of_loss = original(intake.made_loss(self.loss))
        intake.check_roles(self.model, loss, self.data)
        model, of_model = unwrapped(self.model)
        self.notes.extend([*of_model, *of_loss])
        with random_generators_kept():
            rows = _Rows("data", self.data, self.notes)
            held_out = rows
            if self.validation is not None:
                held_out = _Rows("validation", self.validation, self.notes)
            else:
                self.notes.append("no validation rows: training rows stand in for them")
            self._set(model=model, loss=loss, _rows=rows)
            self._fit(intake.found_device(self.device))
            self._set(_validated=self._taken(held_out.read(held_out.some(_MOST_VALIDATED))))
            self._set(rule="linear" if isinstance(self._tried_optimizer(), SGD) else "sqrt")
        self._checked(self.batch_size)

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _fit(self, device: torch.device | None) -> None:
        """Find what the data, and what the model returns, need for the loss."""
        objective = Objective(
            *(self.model, self.loss, None),
            params=None,
            device=device,
            autocast=None,
            tf32=False,
        )
        few = self._rows.read(self._rows.some(_FEW))
        few = tree_map(lambda part: part.to(objective.device), few)
        (fitted,), notes = intake.fitted(objective, [few], "running", _FEW)
        self.notes.extend(notes)
        types = [part.dtype for part in tree_leaves(fitted)]
        is_column = fitted[1].ndim < few[1].ndim
        loss = loss_terms.evaluated(copy.deepcopy(self.loss))
        self._set(
            device=objective.device,
            _taken=partial(_converted, device=objective.device, to=(types, is_column)),
            _predicted=objective.predicted,
            _terms=loss_terms.known_terms(self.loss),
            _criterion=loss.to(objective.device) if isinstance(loss, nn.Module) else loss,
        )
        if loss_terms.is_elementwise(self.loss):
            with torch.no_grad():
                outputs = objective.outputs(objective.pieces(objective.theta), fitted)
            loss_terms.refuse_broadcast(outputs, fitted[1])

    def _tried_optimizer(self) -> Optimizer:
        lr = positive("lr", self.lr, "Pass one that is known to work.")
        if isinstance(self.optimizer, str):
            known("optimizer", self.optimizer, OPTIMIZERS)
        made: Any = self.optimizer_for(self.copy(), lr)
        if not isinstance(made, Optimizer):
            raise TypeError(
                "`optimizer` must make an optimizer of parameters and a learning rate; "
                f"got {type(made).__name__}. Pass a name, or lambda p, lr: SGD(p, lr)."
            )
        rates = {float(group["lr"]) for group in made.param_groups}
        got = ", ".join(f"{rate:g}" for rate in sorted(rates))
        ensure(rates == {lr}, "optimizer", f"take the learning rate {lr:g}", got)
        return made

    def _checked(self, batch_size: int) -> int:
        size = whole("batch_size", batch_size, 1)
        contract = f"be at most the {self.num_rows} training rows"
        ensure(size <= self.num_rows, "batch_size", contract, str(size))
        return size

    # -- training ------------------------------------------------------------------------

    @property
    def num_rows(self) -> int:
        """Training rows, without those that hold NaN."""
        return len(self._rows)

    def copy(self) -> nn.Module:
        """The starting point, a new copy on `device`, in training mode."""
        made = deep_copy(self.model).to(self.device).train()
        if self.batchnorm_batch is not None:
            use_ghost_batches(made, self.batchnorm_batch)
        return made

    def optimizer_for(self, model: nn.Module, lr: float) -> Optimizer:
        """A new optimizer of a model's parameters."""
        chosen = self.optimizer
        make = OPTIMIZERS[chosen] if isinstance(chosen, str) else chosen
        return make([p for p in model.parameters() if p.requires_grad], lr)

    def scaled_rate(self, batch_size: float, rule: str | None = None) -> float:
        """The anchor's rate, scaled to another batch size: "linear", "sqrt" or "none"."""
        rule = self.rule if rule is None else rule
        known("rule", rule, RULES)
        return float(self.lr * (batch_size / self.batch_size) ** RULES[rule])

    def update(self, model: nn.Module, optimizer: Optimizer, batch: Any) -> Tensor:
        """One whole update; the batch's loss before it, 0-d, not waited for."""
        optimizer.zero_grad(set_to_none=True)
        loss = self._mean_loss(self._predicted(call_model(model, batch[0])), batch[1])
        loss.backward()
        optimizer.step()
        return loss.detach()

    def _mean_loss(self, outputs: Any, targets: Tensor) -> Tensor:
        value: Tensor = self._criterion(outputs, targets)
        if self._terms is None:
            return value.mean()
        return self._terms.mean(value, self._terms.size(targets))

    def batches(self, batch_size: int, seed: int = 0) -> Iterator[Pair]:
        """An endless stream of shuffled batches on `device`, read as they are asked for.

        Every epoch has an order of its own, and a batch may reach into the next epoch: all
        sizes with one seed see the same rows in the same order. Beyond 2^27 rows, whose
        order alone would fill memory, each row is drawn by itself.

        Raises:
            ValueError: `batch_size` is larger than the number of rows.
        """
        picks = self._rows.picks(self._checked(batch_size), seed)
        return (self._taken(self._rows.read(pick)) for pick in picks)

    def rows(self, num: int, seed: int = 0) -> Pair:
        """`num` training rows at most, drawn without replacement, on `device`."""
        return self._taken(self._rows.read(self._rows.some(num, seed)))

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> tuple[float, float]:
        """Mean loss over the validation rows in evaluation mode, and its standard error.

        The error is that of the draw of rows, from the means of 64 groups of them.
        """
        trained = model.training
        model.eval()
        groups = []
        for part in batches.cut(self._validated, _MOST_VALIDATED // 4):
            groups += list(self._group_losses(model, part))
        model.train(trained)
        values = torch.stack([value for value, _ in groups]).double().cpu().numpy()
        shares = np.array([count for _, count in groups])
        shares = shares / shares.sum()
        n = len(values)
        with np.errstate(all="ignore"):  # a training may diverge
            mean = shares @ values
            variance = shares**2 @ (values - mean) ** 2 * n / np.float64(n - 1)
            return float(mean), float(np.sqrt(variance))

    def _group_losses(self, model: nn.Module, part: Pair) -> Iterator[tuple[Tensor, float]]:
        outputs = self._predicted(call_model(model, part[0]))
        size = -(-len(self._validated[1]) // _GROUPS)
        for some, y in zip(outputs.split(size), part[1].split(size), strict=True):
            count = self._terms.count(y) if self._terms else float(len(y))
            if count:  # else all are ignored, and their mean is 0/0
                yield self._mean_loss(some, y), count

    def facts(self) -> dict[str, Any]:
        """Plain values that tell one problem from another, for a race that goes on."""
        made = self.optimizer_for(self.copy(), self.lr)
        loss = getattr(self.loss, "__name__", str(self.loss))
        first = tree_leaves((self._rows.read(np.arange(1)), self._validated))
        return {
            "num_rows": self.num_rows,
            "start": _tensors.mixed(0, *self.copy().state_dict().values()),
            "data": _tensors.mixed(0, *first),
            "loss": loss,
            "optimizer": f"{type(made).__name__} {made.defaults}",
            "batchnorm_batch": self.batchnorm_batch,
        }


# -- rows --------------------------------------------------------------------------------


class _Rows:
    """Rows by position, read from where they lie; those of arrays without NaN.

    Args:
        name: of the argument that they were.
        data: a pair of arrays, a map-style data set, or what `EmpiricalRisk` takes.
        notes: where to say what was left out.
    """

    def __init__(self, name: str, data: Any, notes: list[str]) -> None:
        if isinstance(data, str | Path) and files.can_be_mapped(data):
            data = files.mapped(data)
        by_number = not _has_arrays(data) and _is_map_style(data)
        if by_number:
            self._read = partial(_of_items, data, _reads_several(data))
            self._num = len(data)
        else:
            if not _has_arrays(data):
                given = intake.batches_of(data, torch.device("cpu"), pairs=True)
                given = batches.joined(given)
                contract = "have rows of one shape"
                ensure(len(given) == 1, name, contract, f"{len(given)} kinds of them")
                data = given[0]
            self._read = partial(_of_arrays, data)
            sizes = {len(part) for part in tree_leaves(data)}
            contract, got = "have as many targets as inputs", ", ".join(map(str, sizes))
            ensure(len(sizes) == 1, name, contract, got)
            (self._num,) = sizes
        ensure(self._num > 0, name, "hold at least one row", "none")
        self._kept: np.ndarray | None = None
        self._last: tuple[int, int, np.ndarray] = (0, -1, np.empty(0))
        looked_at = self.some(_MOST_VALIDATED) if by_number else np.arange(self._num)
        self._look_through(name, looked_at, notes)

    def __len__(self) -> int:
        return self._num if self._kept is None else len(self._kept)

    def read(self, positions: np.ndarray) -> Pair:
        """(inputs, targets) of these rows, tensors where they lie."""
        return self._read(positions if self._kept is None else self._kept[positions])

    def some(self, num: int, seed: int = 0) -> np.ndarray:
        """Positions of `num` rows at most, rising, drawn without replacement."""
        total = len(self)
        if num >= total:
            return np.arange(total)
        return np.sort(np.random.default_rng(seed).choice(total, num, replace=False))

    def picks(self, size: int, seed: int) -> Iterator[np.ndarray]:
        """Endless positions (size,), epoch by epoch."""
        if len(self) > _MOST_ORDERED:
            rng = np.random.default_rng(seed)
            while True:
                yield rng.integers(len(self), size=size)
        left = self._order(seed, 0)
        for epoch in itertools.count(1):
            whole = len(left) // size * size
            yield from left[:whole].reshape(-1, size)
            left = np.concatenate([left[whole:], self._order(seed, epoch)])

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        """All positions, shuffled; kept, since several sizes ask for the same."""
        if self._last[:2] != (seed, epoch):
            rng = np.random.default_rng(_tensors.mixed(seed, epoch))
            positions = np.arange(len(self), dtype=np.int32)
            self._last = seed, epoch, rng.permutation(positions)
        return self._last[2]

    def _look_through(self, name: str, where: np.ndarray, notes: list[str]) -> None:
        """Leave out rows with NaN (of arrays), and say so; as where nothing is to learn."""
        wrong, first, varies = [], None, False
        for some in np.split(where, range(_AT_ONCE, len(where), _AT_ONCE)):
            pair = self.read(some)
            wrong.append(intake.not_finite(pair).cpu().numpy())
            first = pair[1][:1].clone() if first is None else first
            varies = varies or bool((pair[1] != first).any())
        bad = np.concatenate(wrong)
        if bad.any():
            contract, got = "hold rows without NaN", f"NaN or infinity in all {len(bad)}"
            ensure(not bad.all(), name, contract, got, "Fill them in.")
            text = f"{name}: {int(bad.sum())} of {len(bad)} rows hold NaN or infinity"
            all_seen = len(where) == self._num
            self._kept = where[~bad] if all_seen else None
            what = "left out" if all_seen else "not left out, as the others were not read"
            notes.append(f"{text}, the first in row {where[bad][0]}: {what}")
        elif not varies and len(bad) > 1:
            notes.append(f"{name}: all targets are the same, so there is nothing to learn")


def _has_arrays(data: Any) -> bool:
    """(inputs, targets) whose rows can be taken where they lie."""

    def is_array(part: Any) -> bool:
        sparse = getattr(part, "layout", torch.strided) != torch.strided
        return not (sparse or hasattr(part, "tocoo") or hasattr(part, "iloc"))

    return batches.is_pair(data) and all(map(is_array, tree_leaves(data)))


def _is_map_style(data: Any) -> bool:
    if isinstance(data, list | tuple | str | Mapping) or hasattr(data, "shape"):
        return False
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _reads_several(data: Any) -> bool:
    """Whether a data set gives a batch for a list of rows."""
    try:
        found = batches.as_pair(data[[0, 1]])
        return batches.is_pair(found) and len(found[1]) == 2
    except Exception:  # whatever a stranger's `__getitem__` says to a list
        return False


def _of_items(data: Any, several: bool, positions: np.ndarray) -> Pair:
    where = positions.tolist()
    found = data[where] if several else default_collate([data[i] for i in where])
    found = batches.as_pair(found)
    contract, got = "give pairs (inputs, targets)", type(found).__name__
    ensure(batches.is_pair(found), "data", contract, got)
    inputs, targets = tree_map(torch.as_tensor, found)
    return inputs, targets


def _of_arrays(data: Pair, positions: np.ndarray) -> Pair:
    # A file is read from front to back, and h5py takes rising positions alone.
    rising, back = positions, np.arange(len(positions))
    if not (np.diff(positions) > 0).all():
        rising, back = np.unique(positions, return_inverse=True)

    def taken(part: Any) -> Tensor:
        if isinstance(part, Tensor):
            where = torch.from_numpy(positions).to(part.device)
            return part.detach().index_select(0, where)
        return torch.from_numpy(np.asarray(part[rising])[back])

    inputs, targets = tree_map(taken, data)
    return inputs, targets


def _converted(
    pair: Pair, *, device: torch.device, to: tuple[list[torch.dtype], bool]
) -> Pair:
    """On the device, in the types that model and loss take; (N, 1) classes as (N,)."""
    types, is_column = iter(to[0]), to[1]
    inputs, targets = tree_map(lambda part: part.to(device, next(types)), pair)
    return inputs, targets.squeeze(1) if is_column else targets
