"""Does a large batch find a sharper minimum, and generalise worse? From the records.

Six sentences and a forest plot, both of the networks that Keskar et al. (2017) trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sharpness.lab import data
from sharpness.report.panels import Estimate, ForestPanel, draw_forest
from sharpness.reproduce.claims import (
    MIN_STARTS,
    Effect,
    Finding,
    Published,
    Verdict,
    counts_of,
    effect_of,
    moves,
    published_effect,
)
from sharpness.reproduce.columns import (
    Observe,
    Pick,
    accuracy,
    distance,
    lambda_max,
    metric,
    pairs,
    phi,
)
from sharpness.reproduce.keskar2017.study import STUDIES, KeskarStudy, Pair
from sharpness.reproduce.paper import finding
from sharpness.reproduce.papers import PAPERS
from sharpness.reproduce.runner import ObservationStore

_END = "at the end of training, the paper's protocol"
_BEST = "at the end, best value found"
_EPOCHS = "after equal epochs, the paper's protocol"
_LOSS = "at equal training loss, the paper's protocol"
_RUNNING = "BatchNorm on running statistics"
_PAPER = "the paper (five trials)"
_MARKERS = {
    _END: ("o", 0),
    _BEST: ("s", 4),
    _EPOCHS: ("^", 2),
    _LOSS: ("D", 3),
    _RUNNING: ("v", 5),
    _PAPER: ("x", 1),
}
_DATA = {
    "mnist": "MNIST images",
    "fashion-mnist": "Fashion-MNIST images",
    "cifar10": "CIFAR-10 images",
    "cifar100": "CIFAR-100 images",
    "spoken-digits": "frames of spoken digits",
}
_ROWS = ("φ(1e-3)", "φ(5e-4)", "φ(1e-3), random subspace", "λ_max")


@dataclass(frozen=True, kw_only=True)
class _Group:
    """What is known of one network at one size.

    Args:
        study: network, data and sizes.
        ratios: large over small batch, by row of `_ROWS` and how.
        gaps: test accuracy of the large batch less the small one's, points, by how.
        distances: distance from the start, small over large batch, by how.
        findings: of Tables 2, 3 and 4, and of the distance.
    """

    study: KeskarStudy
    ratios: dict[tuple[int, str], Effect]
    gaps: dict[str, Effect]
    distances: dict[str, Effect]
    findings: dict[str, Finding]

    @property
    def name(self) -> str:
        """`F1 on 5000 MNIST images`."""
        whole = self.study.data.partition("[")[0]
        known = data.outline(self.study.data)
        number = f"{known.num_train} " if known else ""
        network = self.study.network.partition("?")[0]
        return f"{network} on {number}{_DATA.get(whole, whole)}"

    @property
    def sizes(self) -> str:
        """Batch sizes and epochs, small and large."""
        study = self.study
        return (
            f"batch {study.small} and {study.large}, "
            f"{study.epochs_small[-1]:g} and {study.epochs_large[-1]:g} epochs"
        )

    @property
    def n(self) -> int:
        """Starting points of which both ends were measured."""
        effect = self.ratio(0)
        return effect.n if effect else 0

    @property
    def fits(self) -> bool:
        """Whether the premise of Table 2 does not fail."""
        return self.findings["table2"].outcome is not Verdict.NO_PREMISE

    def ratio(self, row: int, how: str = _END) -> Effect | None:
        """One of the ratios."""
        return self.ratios.get((row, how))


def groups(store: ObservationStore) -> list[_Group]:
    """Every study of which both ends were measured, the paper's own sizes first."""
    order = ("full", "reduced", "quick")
    found = [
        _group(study, store)
        for study in sorted(STUDIES, key=lambda study: order.index(study.preset))
        if any(
            study.sharpness(network) in store for pair in study.ends() for network in pair
        )
    ]
    return [group for group in found if group.ratio(0)]


def _group(study: KeskarStudy, store: ObservationStore) -> _Group:
    end, other, ends = study.sharpness, study.curvature_and_phi, study.ends()

    def effect(
        observe: Observe,
        pick: Pick,
        networks: Sequence[Pair],
        second: Observe | None = None,
        ratio: bool = True,
    ) -> Effect | None:
        values = pairs(store, observe, pick, networks, second)
        return effect_of(*moves(*values, ratio)) if values[0] else None

    def theirs(table: str, key: str, ratio: bool = True) -> Effect | None:
        published: Published | None = (study.published(table) or {}).get(key)
        return published_effect(published, ratio) if published else None

    normal, best = phi(0, of="phi_normal"), phi(0, "phi", "phi_normal_best")
    ratios = {
        (0, _PAPER): theirs("table3", "0.001"),
        (1, _PAPER): theirs("table3", "0.0005"),
        (2, _PAPER): theirs("table4", "0.001"),
        (2, _END): effect(end, normal, ends),
        (2, _BEST): effect(end, best, ends) if "phi_normal_best" in study.also else None,
        (0, _BEST): effect(end, phi(0, "phi"), ends),
        (1, _BEST): effect(end, phi(1, "phi"), ends),
    }
    for row, pick in ((0, phi(0)), (1, phi(1)), (3, lambda_max)):
        ratios |= {
            (row, _END): effect(end, pick, ends),
            (row, _EPOCHS): effect(other, pick, study.equal_epochs()),
            (row, _LOSS): effect(end, pick, study.matched(), other),
        }
    test = "test_accuracy_{}".format
    gaps = {
        _PAPER: theirs("table2", "test", ratio=False),
        _END: effect(accuracy, metric(test("batch"), 100), ends, ratio=False),
        _RUNNING: effect(accuracy, metric(test("running"), 100), ends, ratio=False),
    }
    away = effect(end, distance, [(large, small) for small, large in ends])
    paper = PAPERS["keskar2017"]
    return _Group(
        study=study,
        ratios={key: e for key, e in ratios.items() if e and e.is_ratio},
        gaps={k: e for k, e in gaps.items() if e and (study.batchnorm or k != _RUNNING)},
        distances={_END: away} if away else {},
        findings={
            name: finding(paper, paper.item(name), study, store)
            for name in ("table2", "table3", "table4", "distance")
        },
    )


# -- sentences ---------------------------------------------------------------------------


def sentences(store: ObservationStore) -> list[str]:
    """Six, each an answer with its numbers and its n."""
    found = groups(store)
    own = [group for group in found if group.study.has_papers_size]
    others = [group for group in found if group not in own]

    def ratios(row: int, how: str = _END, among: Sequence[_Group] = found) -> str:
        return _listed([(group, group.ratio(row, how)) for group in among])

    theirs = [effect for group in own if (effect := group.ratio(0, _PAPER))]
    paper = f" (the paper: {'; '.join(map(str, theirs))})" if theirs else ""
    gaps = _listed([(g, g.gaps.get(_END)) for g in found if g.fits])
    unfit = _joined([group.name for group in found if not group.fits])
    aside = f"; not comparable, since one has not fitted, are {unfit}" if unfit else ""
    return [
        "**Sharper by φ, the paper's measure, at the paper's size?** "
        f"{_answer(own, 'table3')}: φ(1e-3) of the large-batch minimum over the "
        f"small-batch one's is {ratios(0, among=own)}{paper}.",
        f"**And at smaller sizes?** {_answer(others, 'table3')}: the same ratio is "
        f"{ratios(0, among=others)}.",
        "**Sharper by λ_max, the largest eigenvalue of the Hessian?** The ratio is, at the "
        f"end of training, {ratios(3)}; with the large batch stopped at the small one's "
        f"training loss, {ratios(3, _LOSS)}.",
        "**Sharper by φ in 100 random directions (Table 4)?** "
        f"{_answer(found, 'table4')}: the ratio is {ratios(2)}.",
        f"**Does it generalise worse?** {_answer(found, 'table2')}: the large batch's test "
        f"accuracy less the small one's is, in points, {gaps}{aside}.",
        f"**How sure?** {_sure(found)}",
    ]


def _listed(effects: Sequence[tuple[_Group, Effect | None]]) -> str:
    """`97.1× (n = 1) for F1 on 60000 MNIST images, ...`."""
    told = [f"{_told(effect)} for {group.name}" for group, effect in effects if effect]
    return _joined(told) or "not known yet"


def _joined(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _told(effect: Effect) -> str:
    """`9.79× (7.33 to 13.1; n = 6)`."""
    middle, comma, interval = str(effect).partition(", ")
    return f"{middle} ({interval}{'; ' if comma else ''}n = {effect.n})"


def _answer(found: Sequence[_Group], table: str) -> str:
    """`Yes on 3 of 4, no on 1`: verdicts on the direction, whatever the data."""
    outcomes = [group.findings[table].outcome for group in found]
    words = {
        "no": (Verdict.NOT_REPRODUCED,),
        "undecided": (Verdict.UNDECIDED, Verdict.SOLVER),
        "not comparable": (Verdict.NO_PREMISE,),
    }
    counts = {
        word: sum(one in verdicts for one in outcomes) for word, verdicts in words.items()
    }
    yes = f"Yes on {outcomes.count(Verdict.REPRODUCED)} of {len(outcomes)}"
    return ", ".join([yes, *(f"{word} on {num}" for word, num in counts.items() if num)])


def _sure(found: Sequence[_Group]) -> str:
    verdicts = [one for group in found for one in group.findings.values()]
    counts = counts_of(one.outcome for one in verdicts)
    nums = [f"n = {group.n}" for group in found]
    return (
        f"Of {len(verdicts)} verdicts (Tables 2 to 4 and the distance from the start, on "
        f"{len(found)} networks of {_joined(list(dict.fromkeys(nums)))} starting points) "
        f"{_joined(counts)}; brackets hold 95 % intervals over starting points, and fewer "
        f"than {MIN_STARTS} decide nothing."
    )


# -- picture -----------------------------------------------------------------------------


def draw_answer(path: Path, store: ObservationStore) -> Path:
    """The forest plot."""
    found, height = groups(store), len(_ROWS) + 1
    ratios, gaps, distances = ([], [], [])
    for i, group in enumerate(found):
        top = i * height
        for row in range(len(_ROWS)):
            of_row = {
                how: effect for (at, how), effect in group.ratios.items() if at == row
            }
            ratios += _estimates(
                top + 1 + row, of_row, group.n, faint=_ROWS[row] == "λ_max"
            )
        gaps += _estimates(top + height / 2, group.gaps, group.n, spread=2.4)
        distances += _estimates(top + height / 2, group.distances, group.n)
    unfit = [
        (i * height - 0.5, (i + 1) * height - 0.5)
        for i, group in enumerate(found)
        if not group.fits
    ]
    return draw_forest(
        path,
        [
            ForestPanel(
                title="(a) sharpness: large batch / small batch",
                x_label="ratio, 95 % interval over n starting points",
                estimates=ratios,
                lines=(1, 10),
                log=True,
                ticks=(0.001, 0.01, 0.1, 1, 10, 100, 1000),
            ),
            ForestPanel(
                title="(b) test accuracy: large − small",
                x_label="points",
                estimates=gaps,
                lines=(0,),
                hatched=unfit,
            ),
            ForestPanel(
                title="(c) distance from the start: small / large",
                x_label="ratio; grey: 3 to 10, as in the paper",
                estimates=distances,
                lines=(1,),
                band=(3, 10),
                log=True,
                ticks=(1, 3, 10),
            ),
        ],
        groups=[(f"{group.name}: {group.sizes}; n = {group.n}", _ROWS) for group in found],
        markers=_MARKERS,
        hatched="one network has not fitted the training set",
    )


def _estimates(
    row: float,
    effects: dict[str, Effect],
    n: int,
    faint: bool = False,
    spread: float = 0.75,
) -> list[Estimate]:
    """Side by side around a row, in the legend's order; n where it is another one."""
    ordered = [how for how in _MARKERS if how in effects]
    return [
        Estimate(
            row=row + spread * ((i + 0.5) / len(ordered) - 0.5),
            edges=effects[how].edges,
            label=how,
            text="" if how == _PAPER or effects[how].n == n else f"n = {effects[how].n}",
            faint=faint,
        )
        for i, how in enumerate(ordered)
    ]
