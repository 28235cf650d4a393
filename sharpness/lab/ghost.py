"""Ghost batch normalisation: statistics of parts of a batch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sharpness._arguments import require, whole


def use_ghost_batches(model: nn.Module, size: int) -> None:
    """Let every BatchNorm of a model normalise ghost batches in training (in place).

    A batch of B is cut into ceil(B / size) near-equal ghost batches, each normalised with
    its own statistics; the running averages move once for each, as in the authors' code
    (Hoffer et al. 2017, arXiv:1705.08741). The same layer separates the BatchNorm batch
    from the SGD batch in Masters & Luschi (2018, arXiv:1804.07612). Evaluation, names,
    parameters and buffers stay as they are.

    No ghost batch has less than two samples. A layer is told apart by the training mode
    of the whole model: where BatchNorm alone is switched to batch statistics, as for an
    `EmpiricalRisk`, the batch stays whole.

    Raises:
        ValueError: `size` < 2, or a model without BatchNorm.
    """
    whole("ghost_batch_size", size, 2, "One sample has no variance.")
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    contract = "be None for a network without BatchNorm"
    require(bool(layers), "ghost_batch_size", contract, size)
    for layer in layers:
        layer.forward = partial(_in_parts, model, layer, size)  # type: ignore[method-assign]


def _in_parts(model: nn.Module, layer: nn.Module, size: int, input: Tensor) -> Tensor:
    count = max(1, min(-(-len(input) // size), len(input) // 2))
    if not (model.training and layer.training):
        count = 1
    parts = [type(layer).forward(layer, part) for part in input.tensor_split(count)]
    return parts[0] if count == 1 else torch.cat(parts)
