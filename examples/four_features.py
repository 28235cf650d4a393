"""A noisy regression with four features, for `python -m sharpness.batchsize`.

python -m sharpness.batchsize --network examples/four_features.py:network \
        --data examples/four_features.py:rows --lr 3e-3 --batch-size 256
"""

import torch
from torch import Tensor, nn


def rows(num: int = 1_000_000, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Generated rows (N, 4) with noisy targets (N, 1), and 4096 more to validate on."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(num + 4096, 4, generator=draw)
    y = torch.sin(2 * x[:, :1]) + x[:, 1:2] * x[:, 2:3] - 0.5 * x[:, 3:4]
    y = y + torch.randn(len(x), 1, generator=draw)
    return {"train": (x[:num], y[:num]), "test": (x[num:], y[num:])}


def network(width: int = 32) -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
