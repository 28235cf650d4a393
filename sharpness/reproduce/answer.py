"""Does a large batch find a sharper minimum, and generalise worse? From the records.

Six sentences and a forest plot, both of the networks that Keskar et al. (2017) trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sharpness.lab import data
from sharpness.report.panels import Estimate, ForestPanel, draw_forest
from sharpness.reproduce.claims import (
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

_END = "at the end of training, by the paper's search"
_BEST = "at the end, the largest value any search found"
_EPOCHS = "after equal epochs, by the paper's search"
_LOSS = "at equal training loss, by the paper's search"
_RUNNING = "accuracy with BatchNorm's running statistics"
_PAPER = "the paper, on all of its data (five trials)"
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
    "digits": "digits of 8 × 8 pixels",
}
_ROWS = ("φ(1e-3)", "φ(5e-4)", "φ(1e-3), 100 directions", "λ_max (grey)")


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
        few, many = study.epochs_small[-1], study.epochs_large[-1]
        if few == many:
            return f"batch {study.small} and {study.large}, {few:g} epochs each"
        return f"batch {study.small} ({few:g} epochs) and {study.large} ({many:g})"

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


def lead(store: ObservationStore) -> str:
    """The answer in short."""
    found = groups(store)
    told = [
        f"the large batch's minimum of {group.name} is {_middle(sharper)} as sharp by φ as "
        f"the small batch's, and its test accuracy is {_points(gap.middle)}"
        for group in found
        if group.study.has_papers_size
        and (sharper := group.ratio(0))
        and (gap := group.gaps.get(_END))
    ]
    smaller = [group for group in found if not group.study.has_papers_size]
    fit = [group for group in smaller if group.fits]
    sharp = sum(_word(group, "table3") == "yes" for group in smaller)
    worse = sum(_word(group, "table2") == "yes" for group in fit)
    own = "; ".join(told) or "nothing is known yet"
    return (
        f"**In short.** At the paper's size {own}. At smaller sizes it is sharper by φ on "
        f"{sharp} of {len(smaller)} networks, and less accurate on {worse} of the "
        f"{len(fit)} where both fit their training sets."
    )


def _points(gap: float) -> str:
    return f"{abs(gap):.2f} points {'lower' if gap < 0 else 'higher'}"


def sentences(store: ObservationStore) -> list[str]:
    """Six, each an answer with its numbers and its n."""
    found = groups(store)
    own = [group for group in found if group.study.has_papers_size]
    smaller = [group for group in found if group not in own]
    fit = [group for group in smaller if group.fits]
    matched = [group for group in smaller if group.ratio(3, _LOSS)]

    def phi_of(group: _Group) -> Effect | None:
        return group.ratio(0)

    def phi_in_subspace(group: _Group) -> Effect | None:
        return group.ratio(2)

    def gap(group: _Group) -> Effect | None:
        return group.gaps.get(_END)

    return [
        "**Sharper by φ, at the paper's size?** "
        f"{_one_by_one(own, 'table3', phi_of, 'large over small batch, φ is ', _theirs)}.",
        f"**And at smaller sizes?** {_sentence(_by_verdict(smaller, 'table3', phi_of))}.",
        "**Sharper by λ_max?** "
        f"{_sentence(_order(found, lambda g: g.ratio(3)))} at the end of training; at "
        "equal training loss: "
        f"{_order(matched, lambda g: g.ratio(3, _LOSS))}.",
        "**Sharper by φ along 100 random directions alone (the paper's Table 4)?** "
        f"{_one_by_one(own, 'table4', phi_in_subspace)}. At smaller sizes: "
        f"{_by_verdict(smaller, 'table4', phi_in_subspace)}.",
        "**Does it generalise worse?** "
        f"{_one_by_one(own, 'table2', gap, 'its test accuracy moves by ', _in_points)}. "
        f"At smaller sizes: {_by_verdict(fit, 'table2', gap)}; on "
        f"{len(smaller) - len(fit)} more a network has not fitted its training set.",
        f"**How sure?** {_sure(found)}",
    ]


_Of = Callable[[_Group], Effect | None]
_WORDS = {
    "yes": (Verdict.REPRODUCED,),
    "the reverse": (Verdict.NOT_REPRODUCED,),
    "undecided": (Verdict.UNDECIDED, Verdict.SOLVER),
    "not comparable": (Verdict.NO_PREMISE,),
}


def _word(group: _Group, table: str) -> str:
    outcome = group.findings[table].outcome
    return next((word for word, them in _WORDS.items() if outcome in them), "undecided")


def _theirs(group: _Group) -> str:
    effect = group.ratio(0, _PAPER)
    return f"; the paper has {_middle(effect)}" if effect else ""


def _in_points(group: _Group) -> str:
    effect = group.gaps.get(_PAPER)
    return " points" + (f"; the paper has {_middle(effect)}" if effect else "")


def _one_by_one(
    found: Sequence[_Group],
    table: str,
    of: _Of,
    what: str = "",
    more: Callable[[_Group], str] = lambda group: "",
) -> str:
    """`Yes for F1 on 60000 MNIST images: 215× (84.9 to 542; n = 4)`."""
    told = [
        f"{_word(group, table)} for {group.name}: {what}{_told(effect)}{more(group)}"
        for group in found
        if (effect := of(group))
    ]
    return _sentence("; ".join(told)) or "Not known yet (n = 0)"


def _by_verdict(found: Sequence[_Group], table: str, of: _Of) -> str:
    """`yes on 3 of 4 (4.69× to 9.79×), the reverse on 1 (0.19×, ...); n = 6`."""
    by_word = {word: [g for g in found if _word(g, table) == word] for word in _WORDS}
    told = [
        f"{word} on {len(some)}{'' if i else f' of {len(found)}'}{_span(some, of)}"
        for i, (word, some) in enumerate(by_word.items())
        if some or not i
    ]
    return f"{', '.join(told)}; {_starts(found)}"


def _order(found: Sequence[_Group], of: _Of) -> str:
    """`no consistent answer on 5 networks (0.0112× to 1.85×; n = 4 to 6)`."""
    middles = [effect.middle for group in found if (effect := of(group))]
    above = sum(middle > 0 for middle in middles)
    word = "no consistent answer"
    if above in (0, len(middles)):
        word = "larger" if above else "smaller"
    span = _span(found, of).removesuffix(")")
    return f"{word} on {len(middles)} networks{span}; {_starts(found)})"


def _span(found: Sequence[_Group], of: _Of) -> str:
    """` (4.69× to 9.79×)`, or ` (0.19×, MLP on digits of 8 × 8 pixels)`."""
    told = [(effect, group) for group in found if (effect := of(group))]
    if len(told) == 1:
        return f" ({_middle(told[0][0])}, {told[0][1].name})"
    effects = sorted((effect for effect, _ in told), key=lambda effect: effect.middle)
    return f" ({_middle(effects[0])} to {_middle(effects[-1])})" if effects else ""


def _starts(found: Sequence[_Group]) -> str:
    """`n = 6`, or `n = 4 to 6`."""
    nums = sorted({group.n for group in found})
    return f"n = {' to '.join(str(num) for num in dict.fromkeys(nums[:1] + nums[-1:]))}"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _middle(effect: Effect) -> str:
    """`9.79×`."""
    return str(effect).partition(",")[0]


def _told(effect: Effect) -> str:
    """`9.79× (7.33 to 13.1; n = 6)`."""
    middle, comma, interval = str(effect).partition(", ")
    return f"{middle} ({interval}{'; ' if comma else ''}n = {effect.n})"


def _sure(found: Sequence[_Group]) -> str:
    verdicts = [one for group in found for one in group.findings.values()]
    return (
        f"Each network was trained from {_starts(found)} starting points. Of "
        f"{len(verdicts)} verdicts (the paper's Tables 2 to 4 and the distance from the "
        f"start, on {len(found)} networks) "
        f"{_joined(counts_of(one.outcome for one in verdicts))}."
    )


def _joined(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


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
            ratios += _estimates(top + 1 + row, of_row, group.n, faint=row == 3)
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
                x_label="← large batch flatter    ratio, 95 % interval    sharper →",
                estimates=ratios,
                lines=(1, 10),
                log=True,
                ticks=(0.001, 0.01, 0.1, 1, 10, 100, 1000),
            ),
            ForestPanel(
                title="(b) test accuracy: large − small",
                x_label="← large batch worse (points)",
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
