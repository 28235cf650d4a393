"""Evaluation that leaves the model, and every random generator, bit for bit as found."""

from __future__ import annotations

import copy
import inspect
import random
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DataParallel, DistributedDataParallel

_PARALLEL = (DataParallel, DistributedDataParallel)


@contextmanager
def evaluation(model: nn.Module, batchnorm: str) -> Iterator[None]:
    """Dropout off, BatchNorm as chosen, attention differentiable twice."""
    with (
        random_generators_kept(),
        _train_does_nothing(model),
        # The fused attention kernels have no second derivative, nor have cuDNN's
        # recurrent ones.
        sdpa_kernel(SDPBackend.MATH),
        _one_path_of_encoders(),
        _tensors_kept(model),
        held([*_modes(model, batchnorm), *_hindrances(model)]),
    ):
        yield


@contextmanager
def held(settings: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """With these attributes of these objects; afterwards as they were."""
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in settings]
    try:
        for holder, name, value in settings:
            setattr(holder, name, value)
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


def _modes(model: nn.Module, batchnorm: str) -> Iterator[tuple[Any, str, Any]]:
    """Evaluation mode; batch statistics without touching the running averages.

    `track_running_stats=False` makes BatchNorm pass no buffers to its kernel, so there
    is nothing that could be updated. "estimating" updates the buffers it is given:
    `momentum=None` makes them plain averages over the batches.
    """
    by_batch = {"batch": ("track_running_stats", False), "estimating": ("momentum", None)}
    for module in model.modules():
        uses_batch = batchnorm in by_batch and isinstance(module, _BatchNorm)
        yield module, "training", uses_batch
        if uses_batch:
            yield module, *by_batch[batchnorm]


def _hindrances(model: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """What is set otherwise while a model is measured, beside its modes."""
    for parameter in model.parameters():  # a closure may call `optimizer.zero_grad()`
        yield parameter, "grad", None
    for module in model.modules():
        if getattr(module, "sparse", None) is True:  # has no second derivative
            yield module, "sparse", False
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True:  # Hugging Face: for a next token
            yield config, "use_cache", False
    if is_recurrent(model):  # `torch.backends.cudnn.flags` would set those of TF32 along
        yield torch.backends.cudnn, "enabled", False


@contextmanager
def _train_does_nothing(model: nn.Module) -> Iterator[None]:
    """Nor does `eval`: a closure may call them."""
    before = [(m, vars(m).get("train")) for m in model.modules()]
    try:
        for module, _ in before:
            vars(module)["train"] = partial(_same, module)
        yield
    finally:
        for module, own in before:
            vars(module).pop("train", None)
            if own is not None:
                vars(module)["train"] = own


def _same(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


@contextmanager
def no_layers_computed_again(model: nn.Module) -> Iterator[None]:
    """Refuse gradient checkpointing: its second forward pass would miss theta.

    Raises:
        ValueError: a layer is called inside, that is, during a backward pass.
    """

    def refuse(module: nn.Module, *_: Any) -> None:
        if _running_again:
            return
        names = {module: name for name, module in model.named_modules()}
        if module in names:
            raise ValueError(
                "`model` must not compute layers again in its backward pass; got "
                f"{names[module] or type(module).__name__} (gradient checkpointing). "
                "Switch it off: `chunk_size` bounds the memory here."
            )

    with register_module_forward_pre_hook(refuse):
        yield


_running_again: list[bool] = []  # an entry for each such block that is open


@contextmanager
def layers_may_run_again() -> Iterator[None]:
    """Layers are called inside with the parameters that they had: see `computed_again`."""
    _running_again.append(True)
    try:
        yield
    finally:
        _running_again.pop()


def original(loss: Any) -> tuple[Any, list[str]]:
    """What `torch.compile` has wrapped, for a loss is recognised by what it is."""
    inside = getattr(loss, "_orig_mod", None)
    if inside is None and hasattr(loss, "_torchdynamo_orig_callable"):
        inside = inspect.unwrap(loss._torchdynamo_orig_callable)
    if inside is None:
        return loss, []
    return inside, ["torch.compile: the original loss is evaluated"]


def unwrapped(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The module inside `torch.compile`, DDP and DataParallel, and what was taken off."""
    notes = []
    while True:
        name = type(model).__name__
        inside = getattr(model, "_orig_mod", None)
        if isinstance(inside, nn.Module):
            model = inside
            notes.append("torch.compile: the original module is measured")
        elif isinstance(model, _PARALLEL):
            model = model.module
            notes.append(f"{name}: the module inside is measured")
        else:
            break
    inside = [
        name
        for name, module in model.named_modules()
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
    ]
    if inside:
        notes.append(f"torch.compile: {inside[0] or 'the model'} is run uncompiled")
    return model, notes


@contextmanager
def _one_path_of_encoders() -> Iterator[None]:
    """Transformer encoders take a shortcut (nested tensors) where nothing needs grad."""
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _tensors_kept(model: nn.Module) -> Iterator[None]:
    """Tensors in plain attributes, which hooks (pruning, spectral norm) set anew.

    And the parameters themselves: of a layer that has two names `functional_call` leaves
    its own there.
    """
    before = [
        (holder, {k: _shallow(v) for k, v in holder.items() if _holds_tensors(v)})
        for m in model.modules()
        for holder in (vars(m), m._parameters, m._buffers)
    ]
    try:
        yield
    finally:
        for attributes, kept in before:
            attributes.update({k: _shallow(v) for k, v in kept.items()})


def deep_copy(model: nn.Module) -> nn.Module:
    """A copy of a model, also where a hook has left a computed tensor as an attribute."""
    with _tensors_kept(model):
        for module in model.modules():
            attributes = vars(module)
            for name, value in attributes.items():
                if isinstance(value, torch.Tensor) and not value.is_leaf:
                    attributes[name] = value.detach()
        return copy.deepcopy(model)


def _holds_tensors(value: Any) -> bool:
    """A tensor; or a list of them, or of references, as recurrent layers keep."""
    kinds = (torch.Tensor, weakref.ref, type(None))
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, kinds) for item in value)
    return isinstance(value, torch.Tensor)


def _shallow(value: Any) -> Any:
    return list(value) if isinstance(value, list) else value


def is_recurrent(model: nn.Module) -> bool:
    """Whether a layer loops over time steps."""
    return any(isinstance(m, nn.RNNBase | nn.RNNCellBase) for m in model.modules())


def convolves(model: nn.Module) -> bool:
    """Whether a layer is a convolution."""
    return any(isinstance(m, _ConvNd) for m in model.modules())


@contextmanager
def random_generators_kept(seed: int = 0) -> Iterator[None]:
    """Any draw inside (a functional dropout, say) is the same each time and unseen."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        seed_generators(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


# Where PyTorch 2.9 and newer say it, the more general ones first: others inherit from them.
_NEWER_FLAGS = (
    *("", "cudnn", "mkldnn"),
    *("cuda.matmul", "cudnn.conv", "cudnn.rnn"),
    *("mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn"),
)


@contextmanager
def true_float32() -> Iterator[None]:
    """Products of float32 numbers with all of their 24 bits.

    TF32 has 11 and bfloat16 8. PyTorch allows TF32 in cuDNN's convolutions unless told
    otherwise, and in matrix products after `torch.set_float32_matmul_precision`.
    """
    try:
        older = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # only the newer flags tell what is set
        older = None
    before = [(flag, flag.fp32_precision) for flag in _newer_flags()]
    try:
        if older is not None:
            _set_older_flags("highest", False)
        for flag, _ in before:
            if flag.fp32_precision not in ("none", "ieee"):
                flag.fp32_precision = "ieee"
        yield
    finally:
        if older is not None:
            _set_older_flags(*older)
        for flag, value in before:  # what inherits its value again is not pinned to it
            if flag.fp32_precision != value:
                flag.fp32_precision = value


@cache
def _newer_flags() -> list[Any]:
    found = []
    for name in _NEWER_FLAGS:
        with suppress(AttributeError):
            flag = attrgetter(name)(torch.backends) if name else torch.backends
            if hasattr(flag, "fp32_precision"):
                found.append(flag)
    return found


def _set_older_flags(matmul: str, cudnn: bool) -> None:
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = cudnn


def seed_generators(seed: int = 0) -> None:
    """One state of every generator a forward pass may draw from."""
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would queue a CUDA seed
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def random_states() -> tuple[Any, ...]:
    """The states of those generators, to be compared."""
    states = [torch.default_generator.get_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    others = numpy_state[1].tobytes(), numpy_state[2:], random.getstate()
    return *(bytes(state.numpy()) for state in states), *others


def batchnorm_layers(model: nn.Module) -> list[str]:
    """Names of the BatchNorm layers, in order."""
    return [name for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
