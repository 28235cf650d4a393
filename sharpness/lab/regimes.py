"""How the papers trained, by name: settings of a `Training`, and for how many epochs.

What a paper leaves open is marked; a run may override every setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Regime:
    """Settings of `training.Training`, a batch size where the regime has one, epochs."""

    source: str
    epochs: float | None = None  # None: the command's own default
    batch_size: int | None = None
    training: dict[str, Any] = field(default_factory=dict)


_SMITH = "Smith et al. 2018, arXiv:1711.00489, section 5.1"
_DROPS = "drops=(60,120,160)&factor=5"
_MOST = "&max_batch_size=5120"


def _smith(
    schedule: str, batch_size: int = 128, rate: float = 0.1, momentum: float = 0.9
) -> Regime:
    """Wide ResNet 16-4 on CIFAR-10; weight decay and ghost batch size are not stated."""
    settings = {
        "optimizer": "momentum",
        "learning_rate": rate,
        "momentum": momentum,
        "weight_decay": 5e-4,  # of Zagoruyko & Komodakis 2016
        "schedule": schedule,
        "ghost_batch_size": 128,
        "augmentation": "crop-flip",
    }
    return Regime(source=_SMITH, epochs=200, batch_size=batch_size, training=settings)


def _hoffer(schedule: str, epochs: float, **settings: Any) -> Regime:
    """Momentum 0.9, square-root scaling from a batch of 128, ghost batches of 128."""
    common = {
        "optimizer": "momentum",
        "momentum": 0.9,
        "scaling": "sqrt",
        "base_batch_size": 128,
        "schedule": schedule,
        "clip_norm": 5.0,
        "ghost_batch_size": 128,
        "regime_adaptation": True,
    }
    return Regime(
        source="Hoffer, Hubara, Soudry 2017, arXiv:1705.08741, and the authors' code",
        epochs=epochs,
        training={**common, **settings},
    )


REGIMES: dict[str, Regime] = {
    "keskar2017": Regime(
        source="Keskar et al. 2017, arXiv:1609.04836: Adam, one rate for all batch sizes; "
        "the rate (Keras' default) and the epochs are not stated",
        training={"optimizer": "adam", "learning_rate": 1e-3},
    ),
    "masters2018": Regime(
        source="Masters & Luschi 2018, arXiv:1804.07612: SGD without momentum, a rate per "
        "sample (2^-8 is one of 2^-12 ... 2^0), CIFAR-10",
        epochs=82,
        batch_size=32,
        training={
            "optimizer": "sgd",
            "learning_rate": 2.0**-8,
            "scaling": "linear",
            "base_batch_size": 1,
            "weight_decay": 1e-4,  # 5e-4 for AlexNet
            "schedule": "decay?drops=(41,61.5)&factor=10",
        },
    ),
    "smith2018-decay": _smith(f"decay?{_DROPS}"),
    "smith2018-hybrid": _smith(f"hybrid?{_DROPS}{_MOST}"),
    "smith2018-increase": _smith(f"increase?{_DROPS}{_MOST}"),
    "smith2018-increased-rate": _smith(f"increase?{_DROPS}{_MOST}", 640, 0.5),
    "smith2018-increased-momentum": _smith(f"increase?{_DROPS}{_MOST}", 3200, 0.5, 0.98),
    "hoffer2017-mnist": _hoffer(
        "decay?drops=(10,20,30)&factor=10", 50, learning_rate=0.1, weight_decay=1e-4
    ),
    "hoffer2017-cifar": _hoffer(
        "decay?drops=(81,122,164)&factor=10",
        200,
        learning_rate=0.1,
        weight_decay=1e-4,
        augmentation="crop-flip",
    ),
}
