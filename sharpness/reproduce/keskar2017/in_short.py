"""The paper's question in short: is a large batch sharper, and is it worse?

Both networks of every starting point at the end of training: accuracies, phi, lambda_max,
distance from the start. Nothing else is trained or measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from sharpness.report.figures import Figure
from sharpness.report.panels import Estimate, ForestPanel, forest_figure
from sharpness.reproduce.claims import MIN_STARTS, Effect, effect_of, moves
from sharpness.reproduce.columns import (
    Observe,
    Pick,
    accuracy,
    distance,
    lambda_max,
    metric,
    observed,
    pairs,
    phi,
)
from sharpness.reproduce.keskar2017.study import KeskarStudy, flat
from sharpness.reproduce.observations import Observation
from sharpness.reproduce.runner import ObservationStore
from sharpness.statistics import mean_and_sd, mean_sd

Values = tuple[list[float], list[float]]  # small and large batch, by starting point
_END = "at the end of training"
_NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six")


def observations(study: KeskarStudy) -> list[Observation]:
    """What the answer rests on."""
    return observed(flat(study.ends()), accuracy, study.curvature_and_phi)


def _quantities(study: KeskarStudy) -> dict[str, tuple[Observe, Pick, tuple[str, str]]]:
    """For each row: how it is observed, what is picked, where the paper has it."""
    measured = study.curvature_and_phi
    return {
        "phi(1e-3), %": (measured, phi(0), ("table3", "0.001")),
        "phi(5e-4), %": (measured, phi(1), ("table3", "0.0005")),
        "lambda_max": (measured, lambda_max, ("", "")),
        "training loss": (accuracy, metric("train_loss_batch"), ("", "")),
        "training accuracy, %": (
            *(accuracy, metric("train_accuracy_batch", 100)),
            ("table2", "train"),
        ),
        "test accuracy, %": (
            *(accuracy, metric("test_accuracy_batch", 100)),
            ("table2", "test"),
        ),
        "distance from the start": (measured, distance, ("", "")),
    }


def values(study: KeskarStudy, store: ObservationStore) -> dict[str, Values]:
    """Both batches' numbers, by row."""
    return {
        name: pairs(store, observe, pick, study.ends())
        for name, (observe, pick, _) in _quantities(study).items()
    }


def sentences(study: KeskarStudy, store: ObservationStore) -> list[str]:
    """The answer, in so many lines."""
    found = values(study, store)
    n = len(found["lambda_max"][0])
    if not n:
        return ["Every training diverged, so there is nothing to compare."]
    small, large = found["training loss"]
    lower = all(b < a for a, b in zip(small, large, strict=True))
    why = ", where its training loss is lower and curvature with it" if lower else ""
    return [
        f"By Keskar's phi(1e-3) the large batch is {_compared(*found['phi(1e-3), %'])}.",
        f"By lambda_max it is {_compared(*found['lambda_max'])}{why}.",
        f"Test accuracy: {_gap(*found['test accuracy, %'])}.",
        _how_sure(n, _effect(*found["phi(1e-3), %"])),
    ]


def _effect(small: Sequence[float], large: Sequence[float], ratio: bool = True) -> Effect:
    return effect_of(*moves(small, large, ratio))


def _compared(small: Sequence[float], large: Sequence[float]) -> str:
    """`sharper in 3 of 3 pairs, 6.6 times as sharp`, or flatter."""
    up = sum(b > a for a, b in zip(small, large, strict=True))
    effect = _effect(small, large)
    sharper = up > len(small) / 2
    num = up if sharper else sum(b < a for a, b in zip(small, large, strict=True))
    size = 10 ** abs(effect.middle) if effect.is_ratio else float("nan")
    word = "sharper" if sharper else "flatter"
    text = f"{word} in {num} of {len(small)} pairs"
    agrees = effect.is_ratio and sharper == (effect.middle > 0)
    return f"{text}, {size:.3g} times on average" if agrees else text


def _gap(small: Sequence[float], large: Sequence[float]) -> str:
    """`no difference found (-0.1 points, -0.9 to +0.7)`, or lower, or higher."""
    effect = _effect(small, large, ratio=False)
    interval = f", 95 % interval {effect.low:+.2f} to {effect.high:+.2f}"
    told = f"{effect.middle:+.2f} points{interval if len(small) >= MIN_STARTS else ''}"
    if effect.low <= 0 <= effect.high:
        return f"no difference found ({told})"
    return f"the large batch's is {'lower' if effect.middle < 0 else 'higher'} ({told})"


def _how_sure(n: int, effect: Effect) -> str:
    number = _NUMBERS[n] if n < len(_NUMBERS) else str(n)
    count = f"{number} {'pairs decide' if n > 1 else 'pair decides'}"
    if n < MIN_STARTS:
        return f"{count} nothing: take at least {MIN_STARTS} starting points."
    decided = "the order" if effect.low > 0 or effect.high < 0 else "not even the order"
    size = f"{10**effect.low:.2g} to {10**effect.high:.2g} times"
    return f"{count} {decided}, hardly the size (phi: {size}, 95 % interval)."


def rows(study: KeskarStudy, store: ObservationStore) -> list[tuple[str, ...]]:
    """Quantity, small batch, large batch, how they compare, the paper's numbers."""
    shown = []
    for name, (small, large) in values(study, store).items():
        if small:
            sides = [mean_sd(*mean_and_sd(side)) for side in (small, large)]
            effect = _effect(small, large, ratio="accuracy" not in name)
            compared = str(effect).partition(",")[0]
            shown.append((name, *sides, compared, _published(study, name)))
    return shown


def _published(study: KeskarStudy, name: str) -> str:
    table, row = _quantities(study)[name][2]
    known = (study.published(table) or {}).get(row) if table else None
    return " → ".join(mean_sd(*side) for side in known) if known else "–"


def figure(study: KeskarStudy, store: ObservationStore) -> Figure:
    """Ratios of sharpness and of distance, and the gap in test accuracy."""
    found = values(study, store)
    names = ("phi(1e-3), %", "phi(5e-4), %", "lambda_max", "distance from the start")
    ratios = [
        Estimate(row=1 + i, edges=_effect(*found[name]).edges, label=_END)
        for i, name in enumerate(names)
    ]
    gap = _effect(*found["test accuracy, %"], ratio=False)
    title = f"{study.network} on {study.data}, batch {study.small} and {study.large}"
    labels = [name.removesuffix(", %") for name in names]
    return forest_figure(
        [
            ForestPanel(
                title="large batch / small batch",
                x_label="ratio, 95 % interval over starting points",
                estimates=ratios,
                lines=(1, 10),
                log=True,
                ticks=(0.01, 0.1, 1, 10, 100),
            ),
            ForestPanel(
                title="test accuracy: large − small",
                x_label="points",
                estimates=[Estimate(row=2.5, edges=gap.edges, label=_END)],
                lines=(0,),
            ),
        ],
        groups=[(f"{title}; n = {len(found['lambda_max'][0])}", labels)],
        markers={_END: ("o", 0)},
    )
