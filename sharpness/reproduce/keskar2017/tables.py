"""Tables 2, 3 and 4, the distance from the start, and what other measures say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sharpness._results import short
from sharpness.reproduce.claims import Check, by_both_solvers, paired, ratio_within, within
from sharpness.reproduce.columns import (
    Look,
    Pick,
    accuracy,
    adaptive_rise,
    lambda_max,
    metric,
    pairs,
    phi,
)
from sharpness.reproduce.keskar2017.study import KeskarStudy, both, ends
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.observations import EPSILONS, Accuracy
from sharpness.reproduce.paper import Item
from sharpness.reproduce.runner import ObservationStore


def phi_checks(
    study: KeskarStudy,
    store: ObservationStore,
    look: Look,
    networks: Sequence[tuple[ModelSpec, ModelSpec]],
    *,
    of: str = "phi",
    space: str = "",
    published: dict[str, Any] | None = None,
    judged: bool = True,
) -> Iterator[Check]:
    """For both epsilons: the order, by the protocol and by the best found, and the size.

    In subspaces the protocol's solver ran alone.
    """
    for i, epsilon in enumerate(EPSILONS):
        name = f"phi({short(epsilon)}) %{space}"
        protocol, best = (
            pairs(store, look, phi(i, which, of), networks)
            for which in ("phi_protocol", "phi")
        )
        if not protocol[0]:
            continue
        theirs = (published or {}).get(f"{epsilon:g}")
        check = paired(f"{name}: larger", *protocol, paper=theirs, judged=judged)
        found = paired("— best found", *best)
        yield by_both_solvers(check, found) if of == "phi" else check
        if of == "phi":
            yield replace(found, verdict=None)
        if judged:
            text = f"{theirs[1][0] / theirs[0][0]:.3g}×" if theirs else ""
            words = "— its ratio: 10 or more"
            size = ratio_within(words, *protocol, low=10, paper=text)
            most = ratio_within(words, *best, low=10)
            yield by_both_solvers(size, most) if of == "phi" else size


def _table2(study: KeskarStudy, store: ObservationStore) -> list[Check]:
    published = study.published("table2") or {}
    checks = []
    test, train = (
        pairs(store, accuracy, metric(f"{split}_accuracy_batch", 100), ends(study))
        for split in ("test", "train")
    )
    if test[0]:
        words = "test accuracy, %: smaller"
        theirs = published.get("test")
        checks.append(paired(words, *test, larger=False, ratio=False, paper=theirs))
        if study.batchnorm:
            running = metric("test_accuracy_running", 100)
            values = pairs(store, accuracy, running, ends(study))
            words = "— BatchNorm on running statistics"
            other = paired(words, *values, larger=False, ratio=False, judged=False)
            checks.append(other)
        words = "train accuracy, %: within a point"
        theirs = published.get("train")
        shown = paired(words, *train, ratio=False, paper=theirs, judged=False)
        gained = [large - small for small, large in zip(*train, strict=True)]
        verdict = within(words, gained, -1, 1).verdict
        checks.append(replace(shown, p=None, flip_p=None, verdict=verdict))
        losses = pairs(store, accuracy, metric("train_loss_batch"), ends(study))
        checks.append(paired("training loss", *losses, judged=False))
    return checks


def _looks_at_ends(study: KeskarStudy) -> list[Any]:
    return [study.sharpness(network) for network in both(study)]


def _table3(study: KeskarStudy, store: ObservationStore) -> list[Check]:
    published = study.published("table3")
    return list(phi_checks(study, store, study.sharpness, ends(study), published=published))


def _table4(study: KeskarStudy, store: ObservationStore) -> list[Check]:
    published = study.published("table4")
    return [
        check
        for columns, numbers in (("normal", published), ("unit", None))
        for check in phi_checks(
            study,
            store,
            study.sharpness,
            ends(study),
            of=f"phi_{columns}",
            space=f", {columns} columns",
            published=numbers,
            judged=columns == "normal",
        )
    ]


def _running(study: KeskarStudy) -> Look:
    return partial(study.curvature_and_phi, batchnorm="running")


def _matched(study: KeskarStudy) -> list[tuple[ModelSpec, ModelSpec]]:
    """The large batch stopped at its small-batch twin's training loss."""
    return [
        (small, study.at("large", seed, until_loss_of=small))
        for seed in study.seeds
        for small in [study.at("small", seed)]
    ]


def _beyond_observations(study: KeskarStudy) -> list[Any]:
    looks: list[Any] = _looks_at_ends(study)
    if study.batchnorm:
        looks += [_running(study)(network) for network in both(study)]
    if study.looks_at_fit:
        looks += _fitted_observations(study)
    return looks + [study.curvature_and_phi(large) for _, large in _matched(study)]


def _beyond(study: KeskarStudy, store: ObservationStore) -> list[Check]:
    """The same question to other measures; no claim of the paper is judged."""

    def asked(words: str, first: Look, second: Look, pick: Pick, networks: Any) -> None:
        values = pairs(store, first, pick, networks, second)
        if values[0]:
            checks.append(paired(words, *values, judged=False))

    checks: list[Check] = []
    here, running = study.sharpness, _running(study)
    asked("lambda_max", here, here, lambda_max, ends(study))
    asked("worst rise in the adaptive l2 ball 0.5", here, here, adaptive_rise, ends(study))
    matched = _matched(study)
    words = "large batch stopped at the small one's loss: "
    stopped = study.curvature_and_phi
    asked(f"{words}phi(1e-3), %", here, stopped, phi(0), matched)
    asked(f"{words}lambda_max", here, stopped, lambda_max, matched)
    if study.looks_at_fit:
        checks += _at_fit(study, store)
    if not study.batchnorm:
        return checks
    words = "BatchNorm on running statistics: "
    asked(f"{words}phi(1e-3), %", running, running, phi(0), ends(study))
    asked(f"{words}lambda_max", running, running, lambda_max, ends(study))
    return checks


def _fitted(study: KeskarStudy) -> list[tuple[ModelSpec, ModelSpec]]:
    """Both networks where their training accuracy first reaches the paper's."""
    return [
        (study.fitted("small", seed), study.fitted("large", seed)) for seed in study.seeds
    ]


def _fitted_observations(study: KeskarStudy) -> list[Any]:
    networks = [network for pair in _fitted(study) for network in pair]
    looks: list[Any] = [Accuracy(of=network) for network in networks]
    return looks + [study.curvature_and_phi(network) for network in networks]


def _at_fit(study: KeskarStudy, store: ObservationStore) -> Iterator[Check]:
    """Where the training accuracy first reaches the paper's: it may have stopped there."""
    where = "at the paper's training accuracy: "
    networks = _fitted(study)
    test = pairs(store, accuracy, metric("test_accuracy_batch", 100), networks)
    if test[0]:
        yield paired(f"{where}test accuracy, %", *test, ratio=False, judged=False)
    for i, epsilon in enumerate(EPSILONS):
        values = pairs(store, study.curvature_and_phi, phi(i), networks)
        if values[0]:
            yield paired(f"{where}phi({short(epsilon)}), %", *values, judged=False)


def _distances(study: KeskarStudy, store: ObservationStore) -> list[float]:
    values = pairs(
        store, study.sharpness, lambda facts: facts["distance_from_start"], ends(study)
    )
    return [small / large for small, large in zip(*values, strict=True)]


def _distance(study: KeskarStudy, store: ObservationStore) -> list[Check]:
    ratios = _distances(study, store)
    if not ratios:
        return []
    words = "distance from the start, small over large batch: 3 to 10"
    return [within(words, ratios, 3, 10, paper="3 to 10")]


ITEMS = (
    Item(
        name="table2",
        title="Table 2: accuracy",
        claim="Large-batch networks fit the training set as well and generalise worse.",
        observations=lambda study: [Accuracy(of=network) for network in both(study)],
        checks=_table2,
    ),
    Item(
        name="table3",
        title="Table 3: phi in the full space",
        claim="Large-batch minima are sharper, by one to two orders of magnitude.",
        observations=_looks_at_ends,
        checks=_table3,
    ),
    Item(
        name="table4",
        title="Table 4: phi in a random subspace",
        claim="The same holds in 100 random directions. The paper does not say how they "
        "are drawn; entries from N(0, 1) stand beside its numbers, columns of unit length "
        "below.",
        observations=_looks_at_ends,
        checks=_table4,
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
        observations=_looks_at_ends,
        checks=_distance,
    ),
)
