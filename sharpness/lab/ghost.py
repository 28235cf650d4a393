"""Ghost batch normalisation: statistics of parts of a batch."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def use_ghost_batches(model: nn.Module, size: int) -> None:
    """Let every BatchNorm of a model normalise ghost batches in training (in place).

    A batch of B is cut into ceil(B / size) near-equal ghost batches, each normalised with
    its own statistics; the running averages move once for each, as in the authors' code
    (Hoffer et al. 2017, arXiv:1705.08741). The same layer separates the BatchNorm batch
    from the SGD batch in Masters & Luschi (2018, arXiv:1804.07612). Evaluation, names,
    parameters and buffers stay as they are.

    Raises:
        ValueError: `size` < 2, or a model without BatchNorm.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if size < 2:
        raise ValueError(
            f"`ghost_batch_size` must be at least 2; got {size}. One sample has no "
            "variance."
        )
    if not layers:
        raise ValueError(
            f"`ghost_batch_size` must be None for a network without BatchNorm; got {size}."
        )
    for layer in layers:
        layer.forward = partial(_in_parts, layer, type(layer).forward, size)  # type: ignore[method-assign]


def _in_parts(layer: nn.Module, forward: object, size: int, x: Tensor) -> Tensor:
    count = -(-len(x) // size) if layer.training else 1
    parts = [forward(layer, part) for part in x.tensor_split(count)]  # type: ignore[operator]
    return torch.cat(parts) if count > 1 else parts[0]
