"""Smith et al.'s schedules on CIFAR-10: batch size and learning rate by epoch.

All have the same noise scale at every epoch, so they should learn alike; what differs is
the number of updates. Writes a figure.
"""

import sys

from matplotlib.figure import Figure

from sharpness.lab.regimes import REGIMES
from sharpness.lab.training import Training

SAMPLES, EPOCHS = 50_000, 200
NAMES = ("decay", "hybrid", "increase", "increased-rate", "increased-momentum")
BATCH_SIZES, RATES = (128, 640, 3200, 5120), (0.1, 0.01, 0.001)


def draw() -> Figure:
    """A line for each schedule, batch sizes above learning rates."""
    figure = Figure(figsize=(7.2, 4.8), layout="constrained")
    batch, rate = figure.subplots(2, 1, sharex=True)
    for name in NAMES:
        regime = REGIMES[f"smith2018-{name}"]
        training = Training(
            network="WRN-16-4", batch_size=regime.batch_size, **regime.training
        )
        course = training.course(SAMPLES)
        edges = [*(phase.begins for phase in course.phases), EPOCHS]
        label = f"{name}: {course.num_updates(EPOCHS)} updates"
        sizes = [phase.batch_size for phase in course.phases]
        batch.stairs(sizes, edges, label=label, baseline=None, linewidth=1.5)
        rates = [phase.learning_rate for phase in course.phases]
        rate.stairs(rates, edges, baseline=None, linewidth=1.5)
    for axes, title, ticks in (
        (batch, "batch size", BATCH_SIZES),
        (rate, "learning rate", RATES),
    ):
        axes.set_yscale("log")
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylabel(title)
    rate.set_xlabel("epoch")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


if __name__ == "__main__":
    draw().savefig(sys.argv[1] if len(sys.argv) > 1 else "schedules.png", dpi=150)
