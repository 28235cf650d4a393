"""Model, loss and data as people pass them, made into what a risk understands.

What was changed on the way is said in the risk's notes. A call that cannot be understood,
and a first evaluation that fails for one of the usual reasons, become one line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import loss as torch_losses
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

from sharpness import _tensors
from sharpness._arguments import ensure, known
from sharpness.risk import batches, files, loss_terms
from sharpness.risk.batch_dependence import few_rows, moving, some_rows
from sharpness.risk.first_look import FirstLook
from sharpness.risk.model_state import deep_copy, evaluation, random_generators_kept
from sharpness.risk.objective import Objective, gradients

Pair = batches.Pair
_READ_AT_ONCE = 256  # samples of a data set


# -- the call ----------------------------------------------------------------------------


def check_roles(model: Any, loss: Any, data: Any) -> None:
    """Refuse what is no model, and arguments in another order.

    Raises:
        TypeError: with what stands in the model's place.
        ValueError: layers of whole numbers, which have no derivative.
    """
    got = f"the class {model.__name__}" if inspect.isclass(model) else type(model).__name__
    advice = "Pass the network itself, then the loss, then the data."
    is_loss = isinstance(model, torch_losses._Loss)
    if is_loss or (callable(data) and not isinstance(data, Iterable | Sized | Dataset)):
        advice = "The order is EmpiricalRisk(model, loss, data)."
    elif isinstance(model, Tensor):
        got += " (outputs or a loss value?)"
    if is_loss or not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module; got {got}. {advice}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "`model` must be a network of Python's; got a TorchScript program, whose "
            "parameters nothing can be put in place of. Pass the network it was made from."
        )
    if loss is not None and not (callable(loss) or isinstance(loss, str)):
        raise TypeError(
            "`loss` must be a function of (outputs, targets), or a name such as "
            f"'cross_entropy'; got {type(loss).__name__}. {advice}"
        )
    if whole := whole_layers(model):
        raise ValueError(
            f"`model` must have floating-point weights; got {whole}, quantised to whole "
            "numbers, which have no derivative. Measure the model it was made from."
        )


def whole_layers(model: nn.Module) -> str | None:
    """The first quantised layer, if there is one."""
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        narrow = any(t.is_quantized or t.dtype == torch.int8 for t in own)
        if narrow or "quantized" in type(module).__module__:
            return f"{name or 'the model'} ({type(module).__name__})"
    return None


def found_device(device: Any) -> torch.device | None:
    """The device that was asked for.

    Raises:
        ValueError: it is not there.
    """
    try:
        found = None if device is None else torch.device(device)
        if found is not None and torch.empty(0, device=found).is_meta:
            raise RuntimeError("it holds no numbers")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"`device` must be a device that is there; got {str(device)!r}. Use 'cpu', or "
            "leave it out: the parameters' own."
        ) from error
    return found


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").removesuffix("loss")


_CLASSES: list[Any] = [c for c in vars(torch_losses).values() if inspect.isclass(c)]
_CLASSES = [c for c in _CLASSES if issubclass(c, torch_losses._Loss)]
_NAMED: dict[str, Any] = {
    _plain(each.__name__): each for each in [*loss_terms.FUNCTIONS, *_CLASSES]
}


def made_loss(loss: Any) -> Any:
    """A loss from its name, from its class, or as it is.

    Raises:
        ValueError: no loss of PyTorch's has that name.
        TypeError: a class that needs arguments, or one that takes more than two tensors.
    """
    if isinstance(loss, str):
        known("loss", _plain(loss), _NAMED, "be the name of a loss of torch.nn")
        loss = _NAMED[_plain(loss)]
    if inspect.isclass(loss):
        try:
            loss = loss()
        except TypeError as error:
            raise TypeError(
                f"`loss` must be made where it needs arguments; got the class "
                f"{loss.__name__}. Pass {loss.__name__}(...)."
            ) from error
    check_takes_two(loss, "loss", "outputs, targets")
    return loss


def check_takes_two(function: Any, argument: str, two: str) -> None:
    """Refuse a loss or a closure that cannot be called with two arguments alone.

    Raises:
        TypeError: with the names of what it takes.
    """
    call = function.forward if isinstance(function, nn.Module) else function
    try:
        takes = inspect.signature(call)
    except (TypeError, ValueError):  # no Python code, or no loss
        return
    try:
        takes.bind(None, None)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        names = shorten(", ".join(takes.parameters), 60, placeholder=" …")
        raise TypeError(
            f"`{argument}` must be a function of ({two}); got {name}, which takes "
            f"({names}). Pass `closure=lambda model, batch: ...` and `data=[batch]`."
        ) from error


# -- the data ----------------------------------------------------------------------------


def batches_of(
    data: Any,
    device: torch.device,
    *,
    pairs: bool,
    seed: int = 0,
    num_samples: int | None = None,
) -> list[batches.Batch]:
    """Batches on `device` from a pair, batches, a loader, a data set or a file.

    Args:
        data: as in `EmpiricalRisk`.
        device: where they go.
        pairs: whether (inputs, targets) are asked for; else whatever a closure takes.
        seed: of what a loader draws.
        num_samples: where to stop reading; None for the end.

    Raises:
        TypeError: data of another kind.
        ValueError: none at all, or more than half of the free memory holds.
    """
    if pairs and isinstance(data, Mapping) and batches.as_pair(data) is not data:
        data = [data]
    is_set = _is_data_set(data) or (pairs and _lists_samples(data))
    if isinstance(data, str | Path):
        got = repr(str(data))
        contract = "be tensors, a loader, an .npz, .csv or .parquet file, or a data set"
        ensure(files.is_file(data), "data", contract, got)
        data, is_set = files.read(data), True
    elif is_set:
        at_once = min(num_samples or _READ_AT_ONCE, _READ_AT_ONCE)
        data = DataLoader(data, batch_size=at_once)
    given = batches.materialised(
        data, device, pairs=pairs, seed=seed, num_samples=num_samples
    )
    return batches.joined(given) if is_set and pairs else given


def _is_data_set(data: Any) -> bool:
    """Samples by number, or one after the other: what a `DataLoader` takes."""
    if isinstance(data, Dataset):
        return True
    by_number = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return by_number and not isinstance(data, Iterable) and not hasattr(data, "shape")


def _lists_samples(data: Any) -> bool:
    """[(x, y), ...] where y is a single number, so that it is no batch."""
    first = data[0] if isinstance(data, list) and data else None
    return isinstance(first, tuple) and len(first) == 2 and batches.is_number(first[1])


# -- model, loss and data together -------------------------------------------------------


@dataclass(frozen=True)
class _Trouble:
    """A first evaluation that failed, and how far it came."""

    objective: Objective
    error: Exception
    batch: Any
    outputs: Any = None  # None where the model itself failed

    @property
    def inputs(self) -> list[Tensor]:
        """The tensors that went in."""
        return [t for t in _tensors.leaves(self.batch[0]) if isinstance(t, Tensor)]

    @property
    def targets(self) -> Any:
        return self.batch[1]

    @property
    def scores_classes(self) -> bool:
        """Whether a loss of PyTorch's compares these outputs with class numbers."""
        of_classes = loss_terms.is_class_loss(self.objective.loss)
        return of_classes and isinstance(self.outputs, Tensor)

    def facts(self) -> dict[str, str]:
        """What the lines below say of it."""
        cause = shorten(str(self.error), 76, placeholder=" …").rstrip(".")
        found = {"cause": f"{type(self.error).__name__}: {cause}".replace("`", "'")}
        found["batch"] = shorten(batches.kind(self.batch), 40, placeholder=" …")
        if self.objective.closure is None:
            loss = self.objective.loss
            found["loss"] = getattr(loss, "__name__", type(loss).__name__)
            found["inputs"] = ", ".join(map(_described, self.inputs[:2]))
            found["targets"] = _described(self.targets)
            found["outputs"] = _described(self.outputs)
        return found


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def fitted(
    objective: Objective, given: list[Pair], batchnorm: str, most: int
) -> tuple[list[Pair], list[str]]:
    """The batches as the model and the loss take them, and what was changed for that.

    Nothing is changed that works as it is. Else, one after the other: floating-point data
    to the model's type, the prediction out of what the model returns, class numbers to
    int64 and (N,).

    Raises:
        ValueError: labels that no output belongs to; NaN or infinite data that make f so;
            a failure that `_LINES` knows.

    Cost: the model and the loss on `most` rows; on a batch where they fail.
    """
    notes: list[str] = []
    look = partial(_trouble, objective, batchnorm=batchnorm)
    changed, (trouble, seen) = given, look(given, most)
    for change in _CHANGES:
        if trouble and (found := change(trouble, changed)):
            changed, note = found
            notes.append(note)
            trouble, seen = look(changed, most)
    if trouble is not None:  # not because there were few rows?
        predicted = objective.predicted
        objective.take(lambda outputs: outputs)
        trouble, seen = look(given, None)
        if trouble is not None:
            objective.take(predicted)
            trouble, seen = look(changed, None)
            if trouble is not None:
                _refuse(trouble)
                return changed, notes  # who evaluates it will say what it is
        else:
            changed, notes = given, []
    _check_finite(objective, changed, batchnorm, most)
    return changed, notes + seen


def _trouble(
    objective: Objective, given: list[Pair], most: int | None, batchnorm: str
) -> tuple[_Trouble | None, list[str]]:
    """What fails, if anything does, and else what is noted."""
    batch = few_rows(given, most) if most else given[0]
    leaves, outputs = objective.pieces(objective.theta), None
    look = FirstLook("loss")
    with evaluation(objective.model, batchnorm), torch.no_grad():
        try:
            outputs = objective.outputs(leaves, batch)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            return _Trouble(objective, error, batch), []
        _check_labels(objective.loss, outputs, given)
        try:
            with torch.enable_grad(), look:
                z, at = moving(outputs)
                value = objective.loss_of(
                    leaves, batch, tree_map_only(Tensor, torch.clone, z)
                )
        except Exception as error:
            look.refuse(error)
            return _Trouble(objective, error, batch, outputs), []
        look.refuse()
        if not isinstance(value, Tensor):
            raise TypeError(
                "`loss` must return one value, or one for each row, as a tensor; got "
                f"{type(value).__name__}. Return the loss itself."
            )
        with suppress(RuntimeError):  # a backward pass that fails is another matter
            look.at_value(value, at)
    return None, look.notes


def closure_notes(objective: Objective, given: list[Any], batchnorm: str) -> list[str]:
    """What is noted of a closure on some rows of its first batch, or on all of it.

    Raises:
        ValueError: it uses a loss in a way that cannot be meant, or does not fit the data.

    Cost: a gradient of these rows.
    """
    leaves, trouble = objective.leaves(objective.theta), None
    for whole in (False, True):
        look = FirstLook("closure")
        with evaluation(objective.model, batchnorm), torch.enable_grad():
            try:
                batch = given[0]
                batch = batch if whole else some_rows(batch)
                with look:
                    value = objective.reduced(leaves, batch)
                look.at_value(value, leaves)
            except Exception as error:
                look.refuse(error)
                trouble = _Trouble(objective, error, batch)
                continue
            look.refuse()
        return look.notes
    if trouble is not None:
        if str(trouble.error).startswith("`"):
            raise trouble.error
        _refuse(trouble)
    return []  # who evaluates it will say what it is


def _in_models_type(t: _Trouble, given: list[Pair]) -> tuple[list[Pair], str] | None:
    kinds = {p.dtype for p in t.objective.model.parameters() if p.is_floating_point()}
    floats = {x.dtype for x in t.inputs if x.is_floating_point()}
    if len(kinds) != 1 or not floats - kinds or t.outputs is not None:
        return None
    kind = kinds.pop()
    note = f"floating-point data were converted to {kind}, the model's type"

    def converted(x: Any) -> Any:
        return x.to(kind) if isinstance(x, Tensor) and x.is_floating_point() else x

    return _tensors.mapped(converted, given), note.replace("torch.", "")


def _with_prediction(t: _Trouble, given: list[Pair]) -> tuple[list[Pair], str] | None:
    whole = t.outputs
    kind = type(whole).__name__
    entries = (
        whole
        if isinstance(whole, Mapping)
        else {"logits": whole.logits}
        if hasattr(whole, "logits")
        else {}
    )
    if name := next((each for each in _OUTPUTS if each in entries), None):
        taken = partial(_entry, name=name)
        note = f"the model returns a {kind}: its `{name}` are its outputs"
        if not _ends_in_classes(t, taken(whole)):
            t.objective.take(taken)
            return given, note
        t.objective.take(lambda outputs: taken(outputs).movedim(-1, 1))
        return given, f"{note}, classes last"
    if isinstance(whole, tuple) and whole and isinstance(whole[0], Tensor):
        t.objective.take(lambda outputs: outputs[0])
        return given, f"the model returns a {kind}: its first entry is its outputs"
    return None


def _entry(outputs: Any, name: str) -> Any:
    """An entry of a dict, or an attribute."""
    return outputs[name] if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _with_classes_last(t: _Trouble, given: list[Pair]) -> tuple[list[Pair], str] | None:
    if not _ends_in_classes(t, t.outputs):
        return None
    t.objective.take(lambda outputs: outputs.movedim(-1, 1))
    return given, "the last dimension of the outputs was taken as that of classes"


def _ends_in_classes(t: _Trouble, z: Any) -> bool:
    """Whether outputs (N, T, C) have labels (N, T).

    Raises:
        ValueError: they are the inputs, which a language model's loss shifts by one.
    """
    y = t.targets
    if not loss_terms.is_class_loss(t.objective.loss) or y.is_floating_point():
        return False
    if not isinstance(z, Tensor) or z.ndim < 3 or y.shape != z.shape[:-1]:
        return False
    tokens = (x for x in t.inputs if x.shape == y.shape)
    ensure(
        not any(bool((x == y)[y >= 0].all()) for x in tokens),
        "data",
        "have labels other than the inputs",
        "the same tokens",
        "Shift them by one, or pass `closure=lambda model, batch: model(**batch).loss`.",
    )
    return True


def _with_class_numbers(t: _Trouble, given: list[Pair]) -> tuple[list[Pair], str] | None:
    y = t.targets
    if not t.scores_classes or y.is_floating_point():
        return None
    column = t.outputs.ndim == 2 and y.ndim == 2 and y.shape[1] == 1
    if y.dtype == torch.int64 and not column:
        return None
    note = f"labels of {str(y.dtype).removeprefix('torch.')} were made int64"
    note += " and (N, 1) made (N,)" if column else ""

    def numbers(y: Tensor) -> Tensor:
        return (y.squeeze(1) if column else y).long()

    return [(x, numbers(y)) for x, y in given], note


_OUTPUTS = ("logits", "out")  # as transformers' and torchvision's models name them
_CHANGES = (_in_models_type, _with_prediction, _with_classes_last, _with_class_numbers)


def _check_labels(loss: Any, outputs: Any, given: Sequence[Pair]) -> None:
    """Refuse class numbers that no output belongs to: a GPU would only say "assert"."""
    if not (loss_terms.is_class_loss(loss) and isinstance(outputs, Tensor)):
        return
    targets = [y for _, y in given]
    rest = outputs.shape[2:]  # scores are (N, C, ...), labels (N, ...)
    if outputs.ndim < 2 or any(
        y.is_floating_point() or y.numel() != len(y) * rest.numel() for y in targets
    ):
        return
    labels = torch.cat([y.reshape(-1) for y in targets])
    ignored, classes = loss_terms.keyword(loss, "ignore_index", -100), outputs.shape[1]
    wrong = ((labels < 0) | (labels >= classes)) & (labels != ignored)
    if not wrong.any():
        return
    raise ValueError(
        f"`data` must have labels in [0, {classes}), one for each output; got "
        f"{int(labels[wrong][0])} (and {int(wrong.sum())} of {len(labels)} are outside). "
        "Count from 0, or widen the last layer."
    )


def _check_finite(
    objective: Objective, given: list[Pair], batchnorm: str, most: int
) -> None:
    """Refuse rows with NaN or infinite values, where f is that because of them."""
    wrong = [not_finite(pair) for pair in given]
    rows = torch.cat(wrong).nonzero().flatten().tolist()
    if not rows:
        return
    pair, some = next((p, w) for p, w in zip(given, wrong, strict=True) if w.any())
    leaves = objective.leaves(objective.theta)
    with evaluation(objective.model, batchnorm), torch.enable_grad():
        try:
            few = batches.taken(pair, some.nonzero().flatten()[:most])
            value = objective.reduced(leaves, few).sum()
        except Exception:  # rows that are evaluated whole
            value = objective.reduced(leaves, pair).sum()
        found = [value, *gradients(value, leaves)]
    if not all(bool(part.isfinite().all()) for part in found):
        first = ", ".join(map(str, rows[:3])) + (", …" if len(rows) > 3 else "")
        raise ValueError(
            f"`data` must be finite; got NaN or infinite values in {len(rows)} of "
            f"{sum(map(len, wrong))} rows ({first}), and so is f or its gradient. Leave "
            "them out, or fill them in."
        )


def not_finite(pair: Pair) -> Tensor:
    """(N,) True where a row holds a value that is not finite."""
    found = torch.zeros(len(pair[1]), dtype=torch.bool, device=pair[1].device)
    for part in _tensors.leaves(pair):
        if isinstance(part, Tensor) and part.layout == torch.strided and len(part):
            found |= ~part.isfinite().reshape(len(part), -1).all(1)
    return found


# -- what went wrong ---------------------------------------------------------------------


@contextmanager
def explained(objective: Objective, given: Sequence[Any]) -> Iterator[None]:
    """One line for a closure that fails in a way that `_LINES` knows."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if objective.closure is not None and not str(error).startswith("`"):
            _refuse(_Trouble(objective, error, given[0]))
        raise


def _refuse(trouble: _Trouble) -> None:
    """Raise the first line that fits; with none, nothing."""
    for fits, line in _LINES:
        if fits(trouble):
            raise ValueError(line.format(**trouble.facts())) from trouble.error


def _says(t: _Trouble, *texts: str) -> bool:
    """Whether the model itself failed, with one of these words."""
    of_model = t.objective.closure is None and t.outputs is None
    return of_model and any(text in str(t.error) for text in texts)


def _is_of_the_data(error: Exception) -> bool:
    """Whether it is one of those that a batch of another kind or shape ends in."""
    usual = (*_TYPES, *_SHAPES, "not implemented for", "out of range")
    return isinstance(error, _PROGRAMMED) or any(text in str(error) for text in usual)


def _trains(t: _Trouble) -> bool:
    """Whether a closure works in training mode alone, each time on a copy."""
    closure = t.objective.closure
    if closure is None:
        return False

    def works(training: bool) -> bool:
        try:
            batch = _tensors.mapped(deepcopy, t.batch)
            closure(deep_copy(t.objective.model).train(training), batch)
        except Exception:
            return False
        return True

    with random_generators_kept():
        return works(True) and not works(False)


def _compares_shapes(t: _Trouble) -> bool:
    return t.scores_classes and (
        t.targets.ndim not in (1, t.outputs.ndim - 1)
        or len(t.targets) != len(t.outputs)
        or t.targets.shape[1:] != t.outputs.shape[2:]
    )


_TYPES = ("must have the same dtype", "expected scalar type", "Input type", "scalar types")
_SHAPES = (
    *("cannot be multiplied", "expected input", "Expected input", "must match the size"),
    *("size mismatch", "Expected 2D", "Expected 3D", "Expected 4D", "normalized_shape"),
    *("running_mean should contain", "input.size(-1)", "is invalid for input of size"),
)
_BACKWARD = "backward through the graph a second time"
_PROGRAMMED = (TypeError, KeyError, IndexError, AttributeError)
_CALLS = ("missing", "positional argument", "unexpected keyword")
_LINES: tuple[tuple[Callable[[_Trouble], bool], str], ...] = (
    (
        _trains,
        "`closure` must give the loss in evaluation mode, as f is measured; got {cause}. "
        "In training mode it works: compute it from outputs.",
    ),
    (
        lambda t: t.scores_classes and bool(t.targets.isnan().any()),
        "`data` must have class numbers for {loss}; got NaN among the targets. Leave those "
        "rows out before `y.long()`, which would make numbers of them.",
    ),
    (
        lambda t: t.scores_classes and t.targets.is_floating_point(),
        "`data` must have class numbers for {loss}; got targets {targets}. Pass "
        "`y.long()`, or a loss for values such as 'mse'.",
    ),
    (
        lambda t: t.scores_classes and t.targets.shape == t.outputs.shape,
        "`data` must have class numbers or probabilities for {loss}; got targets "
        "{targets}. Pass `y.argmax(1)`, or `y.float()`.",
    ),
    (
        _compares_shapes,
        "`data` must have a class for each row of scores (N, C, ...); got outputs "
        "{outputs}, targets {targets}. Reshape them.",
    ),
    (
        lambda t: (
            loss_terms.is_elementwise(t.objective.loss)
            and isinstance(t.outputs, Tensor)
            and not t.targets.is_floating_point()
        ),
        "`data` must have floating-point targets for {loss}; got {targets}. Pass "
        "`y.float()`.",
    ),
    (
        lambda t: t.outputs is not None and "between 0 and 1" in str(t.error),
        "`loss` must get probabilities for {loss}; got outputs outside of [0, 1]. Use "
        "'bce_with_logits', or end the model in a sigmoid.",
    ),
    (
        lambda t: t.scores_classes and "weight tensor" in str(t.error),
        "`loss` must have a weight for each class; got outputs {outputs} ({cause}).",
    ),
    (
        lambda t: _says(t, "indices", "Indices"),
        "`data` must have whole numbers for the model's embedding; got {inputs}. Pass "
        "`x.long()`.",
    ),
    (
        lambda t: _says(t, "index out of range in self"),
        "`data` must have tokens below the size of the model's embedding; got {inputs} "
        "with larger ones. Use the model's own tokens.",
    ),
    (
        lambda t: (
            _says(t, *_TYPES)
            and not any(x.is_floating_point() for x in t.inputs)
            and t.targets.is_floating_point()
            and t.targets.ndim > max(x.ndim for x in t.inputs)
        ),
        "`data` must be (inputs, targets); got inputs {inputs} and targets {targets}. Swap "
        "them.",
    ),
    (
        lambda t: _says(t, *_TYPES) and not any(x.is_floating_point() for x in t.inputs),
        "`data` must have floating-point inputs for this model; got {inputs}. Convert "
        "them: `x.float()`, for images `x.float() / 255`.",
    ),
    (
        lambda t: _says(t, *_SHAPES),
        "`data` must have inputs that fit the model; got {inputs} ({cause}). Reshape.",
    ),
    (
        lambda t: _says(t, *_CALLS) and isinstance(t.error, TypeError),
        "`data` must give the model's inputs, ((a, b), y) or ({{'a': a}}, y); got {cause}.",
    ),
    (
        lambda t: (
            loss_terms.asked_reduction(t.objective.loss) is not None
            and t.outputs is not None
            and not isinstance(t.outputs, Tensor)
        ),
        "`model` must return its outputs as a tensor, in evaluation mode; got {outputs}. "
        "Return the tensor, or pass `closure=`.",
    ),
    (
        lambda t: t.objective.closure is not None and _BACKWARD in str(t.error),
        "`closure` must return the loss and leave its gradient to the risk; got {cause}. "
        "Take `backward` out.",
    ),
    (
        lambda t: t.objective.closure is not None and _is_of_the_data(t.error),
        "`closure` must work as closure(model, batch) on a {batch}; got {cause}. Adapt it.",
    ),
    (
        lambda t: t.outputs is not None and "values to unpack" in str(t.error),
        "`loss` must take the outputs that the model gives in evaluation mode, as f is "
        "measured; got {cause}. In training mode it may give others.",
    ),
    (
        lambda t: t.outputs is not None and isinstance(t.error, _PROGRAMMED),
        "`loss` must take outputs and targets ({targets}); got {cause}. For "
        "closure(model, batch) pass `closure=`.",
    ),
)
