"""The tables: accuracy, phi, distance from the start, and remedies for large batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from sharpness._results import short
from sharpness.reproduce.claims import (
    Check,
    Role,
    by_both_solvers,
    paired,
    ratio_within,
    within,
)
from sharpness.reproduce.columns import (
    Observe,
    Pick,
    accuracy,
    adaptive_rise,
    by_solvers,
    distance,
    lambda_max,
    metric,
    number,
    observed,
    pairs,
    phi,
)
from sharpness.reproduce.keskar2017.study import TEST_ACCURACY, KeskarStudy, Pair, flat
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.observations import EPSILONS, Measured, Observation
from sharpness.reproduce.paper import Item
from sharpness.reproduce.runner import ObservationStore


def _phi_checks(
    study: KeskarStudy,
    store: ObservationStore,
    *,
    of: str = "phi",
    best_of: str = "phi",
    space: str = "",
    published: dict[str, Any] | None = None,
    role: Role = Role.PRIMARY,
) -> Iterator[Check]:
    """Of both epsilons, the first being the claim: order and size, and the best found."""
    for i, epsilon in enumerate(EPSILONS):
        order, found = (
            paired(
                words,
                *pairs(store, study.sharpness, pick, study.ends()),
                paper=theirs,
                sized=study.has_papers_size,
                role=Role.SECONDARY if i and role is Role.PRIMARY else role,
            )
            for words, pick, theirs in (
                (
                    f"phi({short(epsilon)}) %{space}: larger",
                    phi(i, of=of),
                    (published or {}).get(f"{epsilon:g}"),
                ),
                ("— best found", phi(i, "phi", best_of), None),
            )
        )
        yield by_both_solvers(order, found)
        if of == "phi":
            yield replace(found, role=Role.BEYOND)


def _table2(study: KeskarStudy, store: ObservationStore) -> Iterator[Check]:
    """That both fit the training set is what the claim rests on."""
    published = study.published("table2") or {}

    def numbers(name: str, times: float = 100) -> tuple[list[float], list[float]]:
        return pairs(store, accuracy, metric(name, times), study.ends())

    small, large = train = numbers("train_accuracy_batch")
    words, gained = "train accuracy, %: within a point", np.subtract(large, small).tolist()
    fits = within(words, gained, -1, 1, role=Role.PREMISE)
    shown = paired(words, *train, ratio=False, paper=published.get("train"))
    yield replace(fits, ours=shown.ours, paper=shown.paper)
    test = partial(paired, larger=False, ratio=False, sized=study.has_papers_size)
    theirs = published.get("test")
    yield test("test accuracy, %: smaller", *numbers("test_accuracy_batch"), paper=theirs)
    if study.batchnorm:
        words = "— BatchNorm on running statistics"
        yield test(words, *numbers("test_accuracy_running"), role=Role.BEYOND)
    yield paired("training loss", *numbers("train_loss_batch", 1), role=Role.BEYOND)


def _at_ends(study: KeskarStudy) -> list[Observation]:
    return observed(flat(study.ends()), study.sharpness)


def _table3(study: KeskarStudy, store: ObservationStore) -> Iterator[Check]:
    return _phi_checks(study, store, published=study.published("table3"))


def _table4(study: KeskarStudy, store: ObservationStore) -> Iterator[Check]:
    yield from _phi_checks(
        study,
        store,
        of="phi_normal",
        best_of="phi_normal_best" if "phi_normal_best" in study.also else "phi_normal",
        space=", normal columns",
        published=study.published("table4"),
    )
    yield from _phi_checks(
        study,
        store,
        of="phi_unit",
        best_of="phi_unit",
        space=", unit columns",
        role=Role.BEYOND,
    )


def _redrawn_on(study: KeskarStudy) -> dict[str, list[Pair]]:
    """Pairs that are compared in several subspaces, by how far they were trained."""
    return {
        "at the end": study.ends(),
        "at equal loss": study.matched(),
        "at equal epochs": study.equal_epochs(),
    }


def _redrawn(study: KeskarStudy, of: ModelSpec) -> Measured:
    return replace(study.measured(of, "phi_normal_redrawn"), seed=of.training.seed)


def _mean_of_draws(i: int, name: str) -> Pick:
    """Of phi for the i-th epsilon, over the subspaces."""

    def mean(facts: dict[str, Any]) -> float:
        draws = facts["phi_normal_redrawn"]
        return float(np.mean([number(draw[i][name]) for draw in draws]))

    return mean


def _table4_redrawn(study: KeskarStudy, store: ObservationStore) -> Iterator[Check]:
    """Whether Table 4's order hangs on the draw of the subspace or on the search."""
    observe = partial(_redrawn, study)
    for where, networks in _redrawn_on(study).items():
        for i, epsilon in enumerate(EPSILONS):
            order, found = (
                paired(
                    f"phi({short(epsilon)}) % {where}{how}",
                    *pairs(store, observe, _mean_of_draws(i, name), networks),
                    role=Role.BEYOND,
                )
                for how, name in (("", "phi_protocol"), (": best found", "phi"))
            )
            yield from (order, found)


def _on_running_statistics(study: KeskarStudy) -> Observe:
    return partial(study.curvature_and_phi, batchnorm="running")


def _beyond_observations(study: KeskarStudy) -> list[Observation]:
    found, both = _at_ends(study), flat(study.ends())
    if study.batchnorm:
        found += observed(both, _on_running_statistics(study))
    if study.observed_at_fit:
        found += observed(flat(study.fitted()), accuracy, study.curvature_and_phi)
    return found + observed([b for _, b in study.matched()], study.curvature_and_phi)


def _beyond(study: KeskarStudy, store: ObservationStore) -> Iterator[Check]:
    """The same question to other measures; no claim of the paper is judged."""
    measured = study.curvature_and_phi

    def asked(
        words: str,
        pick: Pick,
        networks: Sequence[Pair],
        first: Observe,
        second: Observe | None = None,
        ratio: bool = True,
    ) -> Check:
        values = pairs(store, first, pick, networks, second)
        return paired(words, *values, ratio=ratio, role=Role.BEYOND)

    ends, matched = study.ends(), study.matched()
    yield asked("lambda_max", lambda_max, ends, study.sharpness)
    yield asked(
        "worst rise in the adaptive l2 ball 0.5", adaptive_rise, ends, study.sharpness
    )
    words = "large batch stopped at the small one's loss: "
    yield asked(f"{words}phi(1e-3), %", phi(0), matched, study.sharpness, measured)
    yield asked(f"{words}lambda_max", lambda_max, matched, study.sharpness, measured)
    if study.observed_at_fit:  # the paper's trainings may have stopped there
        words, fitted = "at the paper's training accuracy: ", study.fitted()
        yield asked(
            f"{words}test accuracy, %", TEST_ACCURACY, fitted, accuracy, ratio=False
        )
        for i, epsilon in enumerate(EPSILONS):
            yield asked(f"{words}phi({short(epsilon)}), %", phi(i), fitted, measured)
    if study.batchnorm:
        words, running = "BatchNorm on running statistics: ", _on_running_statistics(study)
        yield asked(f"{words}phi(1e-3), %", phi(0), ends, running)
        yield asked(f"{words}lambda_max", lambda_max, ends, running)


def _distance(study: KeskarStudy, store: ObservationStore) -> Iterator[Check]:
    """Farther is the direction, 3 to 10 times as far the size that the paper states."""
    small, large = pairs(store, study.sharpness, distance, study.ends())
    words = "distance from the start, large → small batch: larger"
    size = ratio_within(words, large, small, 3, 10, paper="3 to 10")
    yield replace(paired(words, large, small), size=size.verdict, paper=size.paper)


ITEMS = (
    Item(
        name="table2",
        title="Table 2: accuracy",
        claim="Large-batch networks fit the training set as well and generalise worse.",
        observations=lambda study: observed(flat(study.ends()), accuracy),
        checks=_table2,
    ),
    Item(
        name="table3",
        title="Table 3: phi in the full space",
        claim="Large-batch minima are sharper, by one to two orders of magnitude.",
        observations=_at_ends,
        checks=_table3,
    ),
    Item(
        name="table4",
        title="Table 4: phi in a random subspace",
        claim="The same holds in 100 random directions. The paper does not say how they "
        "are drawn; entries from N(0, 1) stand beside its numbers, columns of unit length "
        "below.",
        observations=_at_ends,
        checks=_table4,
    ),
    Item(
        name="table4-redrawn",
        title="Table 4 again: five random subspaces for each network",
        claim="Not in the paper: whether the order is one draw's, or one search's. Means "
        "over five subspaces with entries from N(0, 1); by the protocol's search, and the "
        "best of two searches from three starts each.",
        observations=lambda study: observed(
            dict.fromkeys(
                net for some in _redrawn_on(study).values() for net in flat(some)
            ),
            partial(_redrawn, study),
        ),
        checks=_table4_redrawn,
        applies=lambda study: study.redrawn,
    ),
    Item(
        name="beyond",
        title="Beyond the paper: other measures, other BatchNorm, equal loss",
        claim="Not in the paper: whether other measures give the same order.",
        observations=_beyond_observations,
        checks=_beyond,
    ),
    Item(
        name="distance",
        title="Section 3: distance from the starting point",
        claim="Small-batch minima lie 3 to 10 times as far from the starting point.",
        observations=_at_ends,
        checks=_distance,
    ),
)


# -- tables 6 and 7, and adversarial training ----------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Remedy:
    """What is done to the trainings of an item.

    Args:
        table: its name among the paper's numbers.
        settings: of the trainings.
        of_both: whether small-batch networks are trained with it as well.
    """

    table: str
    settings: dict[str, Any]
    of_both: bool = False

    def observations(self, study: KeskarStudy) -> list[Observation]:
        """Both networks without it, and those with it."""
        plain, treated = flat(study.ends(study.num_remedied)), self._large(study)
        small = [a for a, _ in study.ends(study.num_remedied, **self.settings)]
        networks = [*plain, *(small if self.of_both else ()), *treated]
        found = observed(networks, accuracy) + observed(plain, study.sharpness)
        return found + observed(treated, study.phi)

    def _large(self, study: KeskarStudy) -> list[ModelSpec]:
        return [large for _, large in study.ends(study.num_remedied, **self.settings)]

    def checks(self, study: KeskarStudy, store: ObservationStore) -> Iterator[Check]:
        """Better than the large batch, and still sharper than the small one?"""
        small, large = zip(*study.ends(study.num_remedied), strict=True)
        treated, published = self._large(study), study.published(self.table) or {}
        values = pairs(store, accuracy, TEST_ACCURACY, zip(large, treated, strict=True))
        plain = (study.published("table2") or {}).get("test")
        theirs = published.get("test")
        theirs = theirs[1] if self.of_both and theirs else theirs
        beside = (plain[1], theirs) if plain and theirs else None
        words = "test accuracy of the large batch, %, without → with: "
        sized = study.has_papers_size
        gain = paired(f"{words}larger", *values, ratio=False, paper=beside, sized=sized)
        if self.table == "adversarial":
            gains = [b - a for a, b in zip(*values, strict=True)]
            words += "at most half a point larger"
            gain = replace(within(words, gains, -100, 0.5), ours=gain.ours)
        yield gain
        cells = (study.published("table3") or {}).get("0.001")
        theirs = published.get("0.001")
        sharp = (cells[0], theirs) if cells and theirs else None
        words = "phi(1e-3), %, small batch → large batch with it: still larger"
        networks = list(zip(small, treated, strict=True))
        yield by_solvers(
            lambda pick: paired(
                words,
                *pairs(store, study.sharpness, pick, networks, study.phi),
                paper=sharp,
                sized=sized,
                role=Role.SECONDARY,
            )
        )


def _item(title: str, claim: str, remedy: _Remedy) -> Item:
    return Item(
        name=remedy.table,
        title=title,
        claim=claim,
        observations=remedy.observations,
        checks=remedy.checks,
        in_quick=False,
    )


REMEDIES = (
    _item(
        "Table 6: data augmentation",
        "Augmentation makes large batches generalise better; their minima stay sharp.",
        _Remedy(table="table6", settings={"augmentation": "keskar"}, of_both=True),
    ),
    _item(
        "Table 7: conservative training",
        "Conservative training makes large batches generalise better; their minima stay "
        "sharp.",
        _Remedy(table="table7", settings={"remedy": "conservative"}),
    ),
    _item(
        "Appendix E: adversarial training",
        "Adversarial training does not make large batches generalise better; their minima "
        "stay sharp.",
        _Remedy(table="adversarial", settings={"remedy": "adversarial"}),
    ),
)
