"""Keskar et al. (2017): every table and figure, for small- and large-batch networks.

From each starting point one network is trained with the small and one with the large
batch. Measures run BatchNorm on batch statistics (the authors' Keras models kept no
others) unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from sharpness.claims import (
    Check,
    by_both_solvers,
    near,
    not_shown,
    paired,
    trend,
    within,
)
from sharpness.lab.training import Budget, Training
from sharpness.report.panels import Curve, Panel
from sharpness.reproduce import paper
from sharpness.reproduce.looks import (
    Facts,
    Look,
    Pick,
    accuracy,
    adaptive_rise,
    band,
    lambda_max,
    listed,
    metric,
    pairs,
    phi,
    points,
)
from sharpness.reproduce.observations import EPSILONS, Accuracy, Joining, Measured
from sharpness.reproduce.paper import Item, Paper, paper_numbers
from sharpness.reproduce.trained import Trained
from sharpness.reproduce.workshop import Seen
from sharpness.results import short

Role = Literal["small", "large"]
ROLES: tuple[Role, Role] = ("small", "large")


@dataclass(frozen=True, kw_only=True)
class Study(paper.Study):
    """Sizes of a network's comparison.

    Args:
        small: batch size.
        large: batch size.
        epochs_small: epochs at which small-batch networks are looked at; the last is
            the end.
        epochs_large: of large-batch ones.
        num_followed: of the starting points, looked at before the end as well.
        num_samples: training samples that sharpness is measured on.
        swept: batch sizes of figure 4.
        epochs_swept: for each of them.
        num_swept: starting points of figure 4.
        epochs_warm: of the large-batch runs of figure 5.
        num_warm: starting points of figure 5.
        num_remedied: starting points of tables 6 and 7 and of adversarial training.
    """

    small: int
    large: int
    epochs_small: tuple[float, ...]
    epochs_large: tuple[float, ...]
    num_followed: int = 3
    num_samples: int | None = 1000
    swept: tuple[int, ...] = ()
    epochs_swept: float = 0.0
    num_swept: int = 3
    epochs_warm: float = 0.0
    num_warm: int = 3
    num_remedied: int = 6

    def with_seeds(self, num: int) -> Study:
        """The same with so many starting points, everywhere."""
        names = ("num_seeds", "num_followed", "num_swept", "num_warm", "num_remedied")
        few = {name: min(num, getattr(self, name)) for name in names}
        return replace(self, **{**few, "num_seeds": num})

    @property
    def seeds(self) -> range:
        """Starting points."""
        return range(self.num_seeds)

    def network_at(
        self,
        batch_size: int,
        seed: int,
        epochs: float,
        start: Trained | None = None,
        until_loss_of: Trained | None = None,
        **settings: Any,
    ) -> Trained:
        """A network of this study: Adam at 1e-3, the same for every batch size."""
        return Trained(
            data=self.data,
            training=Training(
                network=self.network, batch_size=batch_size, seed=seed, **settings
            ),
            budget=Budget(epochs=epochs),
            start=start,
            until_loss_of=until_loss_of,
        )

    def epochs(self, role: Role) -> tuple[float, ...]:
        """When networks of a role are looked at."""
        return self.epochs_small if role == "small" else self.epochs_large

    def at(
        self, role: Role, seed: int, epochs: float | None = None, **more: Any
    ) -> Trained:
        """A network of a role, at its end unless told otherwise."""
        batch_size = self.small if role == "small" else self.large
        return self.network_at(batch_size, seed, epochs or self.epochs(role)[-1], **more)

    def sharpness(self, of: Trained) -> Measured:
        """What the tables need, by the authors' way to run BatchNorm."""
        names = ("lambda_max", "phi", "phi_normal", "phi_unit", "adaptive")
        return Measured(of=of, measures=names, num_samples=self.num_samples)

    def phi(self, of: Trained) -> Measured:
        """Phi alone."""
        return Measured(of=of, measures=("phi",), num_samples=self.num_samples)

    def curvature_and_phi(self, of: Trained, **more: Any) -> Measured:
        """lambda_max and phi."""
        names = ("lambda_max", "phi")
        return Measured(of=of, measures=names, num_samples=self.num_samples, **more)


def ends(study: Study) -> list[tuple[Trained, Trained]]:
    """Small- and large-batch networks, by starting point."""
    return [(study.at("small", seed), study.at("large", seed)) for seed in study.seeds]


def both(study: Study) -> list[Trained]:
    """The same in one list."""
    return [network for pair in ends(study) for network in pair]


def phi_checks(
    study: Study,
    seen: Seen,
    look: Look,
    networks: Sequence[tuple[Trained, Trained]],
    *,
    of: str = "phi",
    space: str = "full space",
    published: dict[str, Any] | None = None,
    judged: bool = True,
) -> Iterator[Check]:
    """For both epsilons: the order, by the protocol and by the best found, and the size.

    In subspaces the protocol's solver ran alone.
    """
    for i, epsilon in enumerate(EPSILONS):
        name = f"phi({short(epsilon)}), {space}, %"
        protocol, best = (
            pairs(seen, look, phi(i, which, of), networks)
            for which in ("phi_protocol", "phi")
        )
        if not protocol[0]:
            continue
        theirs = (published or {}).get(f"{epsilon:g}")
        check = paired(f"{name}: larger", *protocol, paper=theirs, judged=judged)
        found = paired(f"{name}, best found", *best)
        yield by_both_solvers(check, found) if of == "phi" else check
        if of == "phi":
            yield replace(found, verdict=None)
        if theirs is not None and min(*protocol[0], *protocol[1]) > 0:
            ratio = theirs[1][0] / theirs[0][0]
            yield near(f"{name}: ratio within 10 times the paper's", *protocol, ratio)


# -- tables 2, 3, 4 and beyond ---------------------------------------------------------


def _table2(study: Study, seen: Seen) -> list[Check]:
    published = paper_numbers("keskar2017")["table2"].get(study.network, {})
    checks = []
    test, train = (
        pairs(seen, accuracy, metric(f"{split}_accuracy_batch", 100), ends(study))
        for split in ("test", "train")
    )
    if test[0]:
        words = "test accuracy, %: smaller"
        theirs = published.get("test")
        checks.append(paired(words, *test, larger=False, ratio=False, paper=theirs))
        words = "train accuracy, %"
        theirs = published.get("train")
        shown = paired(words, *train, ratio=False, paper=theirs, judged=False)
        less = [small - large for small, large in zip(*train, strict=True)]
        words = "train accuracy, %: at most a point smaller"
        verdict = within(words, less, -100, 1).verdict
        checks.append(replace(shown, claim=words, p=None, flip_p=None, verdict=verdict))
        losses = pairs(seen, accuracy, metric("train_loss_batch"), ends(study))
        checks.append(paired("training loss", *losses, judged=False))
    return checks


def _looks_at_ends(study: Study) -> list[Any]:
    return [study.sharpness(network) for network in both(study)]


def _table3(study: Study, seen: Seen) -> list[Check]:
    published = paper_numbers("keskar2017")["table3"].get(study.network)
    return list(phi_checks(study, seen, study.sharpness, ends(study), published=published))


def _table4(study: Study, seen: Seen) -> list[Check]:
    published = paper_numbers("keskar2017")["table4"].get(study.network)
    return [
        check
        for columns, numbers in (("normal", published), ("unit", None))
        for check in phi_checks(
            study,
            seen,
            study.sharpness,
            ends(study),
            of=f"phi_{columns}",
            space=f"100 random columns, {columns}",
            published=numbers,
            judged=columns == "normal",
        )
    ]


def _running(study: Study) -> Look:
    return partial(study.curvature_and_phi, batchnorm="running")


def _matched(study: Study) -> list[tuple[Trained, Trained]]:
    """The large batch stopped at its small-batch twin's training loss."""
    return [
        (small, study.at("large", seed, until_loss_of=small))
        for seed in study.seeds
        for small in [study.at("small", seed)]
    ]


def _beyond_observations(study: Study) -> list[Any]:
    looks: list[Any] = _looks_at_ends(study)
    looks += [_running(study)(network) for network in both(study)]
    return looks + [study.curvature_and_phi(large) for _, large in _matched(study)]


def _beyond(study: Study, seen: Seen) -> list[Check]:
    """The same question to other measures; no claim of the paper is judged."""

    def asked(words: str, first: Look, second: Look, pick: Pick, networks: Any) -> None:
        found = [(seen.get(first(a)), seen.get(second(b))) for a, b in networks]
        known = [(pick(a), pick(b)) for a, b in found if a and b]
        if known:
            values = [a for a, _ in known], [b for _, b in known]
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
    words = "BatchNorm on running statistics: "
    asked(f"{words}phi(1e-3), %", running, running, phi(0), ends(study))
    asked(f"{words}lambda_max", running, running, lambda_max, ends(study))
    return checks


def _distances(study: Study, seen: Seen) -> list[float]:
    values = pairs(
        seen, study.sharpness, lambda facts: facts["distance_from_start"], ends(study)
    )
    return [small / large for small, large in zip(*values, strict=True)]


def _distance(study: Study, seen: Seen) -> list[Check]:
    ratios = _distances(study, seen)
    if not ratios:
        return []
    words = "distance from the start, small over large batch"
    return [within(words, ratios, 3, 10)]


# -- figures 2 and 6: along training ---------------------------------------------------


def _followed(study: Study, role: Role) -> list[list[Trained]]:
    """For each followed starting point its networks along training."""
    return [
        [study.at(role, seed, epochs) for epochs in study.epochs(role)]
        for seed in range(study.num_followed)
    ]


def _figure2_observations(study: Study) -> list[Any]:
    return [
        Accuracy(of=network)
        for role in ROLES
        for run in _followed(study, role)
        for network in run
    ]


def _accuracies(seen: Seen, run: list[Trained], name: str) -> list[float]:
    found = [seen.get(Accuracy(of=network)) for network in run]
    return [100 * facts["metrics"][name] for facts in found if facts is not None]


def _figure2(study: Study, seen: Seen) -> list[Check]:
    """Would stopping the large batch early have helped?"""
    runs = _followed(study, "large")
    curves = [_accuracies(seen, run, "test_accuracy_batch") for run in runs]
    lost = [max(c) - c[-1] for c in curves if len(c) == len(study.epochs_large)]
    if not lost:
        return []
    words = "large batch: best test accuracy along training less the last, points"
    return [within(words, lost, -0.01, 0.25, paper="no peak is seen")]


def _figure2_panels(study: Study, seen: Seen) -> list[Panel]:
    curves = []
    for colour, role in enumerate(ROLES):
        for split, style in (("test", "o-"), ("train", "o:")):
            runs = _followed(study, role)
            values = [_accuracies(seen, run, f"{split}_accuracy_batch") for run in runs]
            full = [v for v in values if len(v) == len(study.epochs(role))]
            flat = [value for run in full for value in run]
            if full:
                epochs = [*study.epochs(role)] * len(full)
                label = f"{role} batch, {split}"
                curves.append(band(label, epochs, flat, colour=colour, style=style))
    return [
        Panel(title="", x_label="epoch", y_label="accuracy, %", curves=curves, log_x=True)
    ]


def _figure6_observations(study: Study) -> list[Any]:
    return [
        study.phi(network)
        for role in ROLES
        for run in _followed(study, role)
        for network in run
    ]


def _figure6_points(
    study: Study, seen: Seen, role: Role, name: str = "phi_protocol"
) -> list[tuple[float, float]]:
    """(training loss, phi) of every followed network, in order of the loss."""
    looks = [seen.get(study.phi(n)) for run in _followed(study, role) for n in run]
    return sorted((f["value"], phi(0, name)(f)) for f in looks if f)


def _figure6(study: Study, seen: Seen) -> list[Check]:
    """In the lower half of the losses, where the paper's curves part."""

    def growth(words: str, role: Role, name: str, rising: bool) -> Check | None:
        found = _figure6_points(study, seen, role, name)
        lower = found[: len(found) // 2 + 1]
        if len(lower) < 3:
            return None
        falling, values = [-loss for loss, _ in lower], [value for _, value in lower]
        return trend(words, falling, values, rising=rising)

    checks = []
    words = "large batch: phi(1e-3) grows as the loss falls"
    protocol, best = (
        growth(words, "large", name, True) for name in ("phi_protocol", "phi")
    )
    if protocol and best:
        checks.append(by_both_solvers(protocol, best))
    words = "small batch: phi(1e-3) does not grow as the loss falls"
    grown = growth(words, "small", "phi_protocol", True)
    if grown:
        checks.append(not_shown(grown))
    return checks


def _figure6_panels(study: Study, seen: Seen) -> list[Panel]:
    curves = [
        Curve(
            label=f"{role} batch",
            x=[loss for loss, _ in points],
            y=[value for _, value in points],
            colour=colour,
            style="o",
        )
        for colour, role in enumerate(ROLES)
        if (points := _figure6_points(study, seen, role))
    ]
    return [
        Panel(
            title="",
            x_label="cross-entropy on the training set",
            y_label="phi(1e-3), %",
            curves=curves,
            log_x=True,
            log_y=True,
        )
    ]


# -- figures 3 and 7: between the minima -----------------------------------------------


def _joinings(study: Study, arc: bool) -> list[Joining]:
    networks = ends(study)[: study.num_followed]
    return [
        Joining(first=a, second=b, arc=arc, num_samples=study.num_samples, split=split)
        for a, b in networks
        for split in ("train", "test")
    ]


def _rises(curve: Facts) -> tuple[float, float]:
    """Mean rise of f an eighth of the way to both sides of either minimum."""
    at = dict(zip(curve["alphas"], curve["values"], strict=True))
    small, large = ((at[x - 0.125] + at[x + 0.125]) / 2 - at[x] for x in (0.0, 1.0))
    return small, large


def _between(arc: bool, study: Study, seen: Seen) -> list[Check]:
    looks = [j for j in _joinings(study, arc) if j.split == "train"]
    found = [_rises(facts["curve"]) for j in looks if (facts := seen.get(j))]
    if not found:
        return []
    published = ""
    if not arc and study.network in paper_numbers("keskar2017_curves"):
        theirs = paper_numbers("keskar2017_curves")
        values = theirs[study.network]["train_xent"]
        low, high = _rises({"alphas": theirs["alphas"], "values": values})
        published = f"{low:.2g} → {high:.2g} (one pair)"
    small, large = [a for a, _ in found], [b for _, b in found]
    words = "rise of the training loss an eighth of the way off, small → large: larger"
    return [replace(paired(words, small, large), paper=published)]


def _between_panels(arc: bool, study: Study, seen: Seen) -> list[Panel]:
    panels = []
    shown = _joinings(study, arc)[:2]  # of one pair, as in the paper
    theirs = {} if arc else paper_numbers("keskar2017_curves")
    for key, name, times in (("values", "xent", 1.0), ("accuracies", "acc", 100.0)):
        curves = []
        for colour, joining in enumerate(shown):
            facts = seen.get(joining)
            if facts is None:
                continue
            y = [times * value for value in facts["curve"][key]]
            x, split = facts["curve"]["alphas"], joining.split
            curves.append(Curve(label=f"ours, {split}", x=x, y=y, colour=colour))
            if study.network in theirs:
                published = theirs[study.network][f"{split}_{name}"]
                curves.append(
                    Curve(
                        label=f"paper, {split}",
                        x=theirs["alphas"],
                        y=published,
                        colour=colour,
                        style="s--",
                        faint=True,
                    )
                )
        label = "cross-entropy" if key == "values" else "accuracy, %"
        where = "alpha: 0 small batch, 1 large batch"
        panels.append(
            Panel(title="", x_label=where, y_label=label, curves=curves, marks=(0, 1))
        )
    return panels


# -- figure 4: batch sizes -------------------------------------------------------------


def _swept(study: Study) -> list[tuple[int, Trained]]:
    return [
        (batch_size, study.network_at(batch_size, seed, study.epochs_swept))
        for batch_size in study.swept
        for seed in range(study.num_swept)
    ]


def _figure4_observations(study: Study) -> list[Any]:
    networks = [network for _, network in _swept(study)]
    looks: list[Any] = [Accuracy(of=network) for network in networks]
    return looks + [study.curvature_and_phi(network) for network in networks]


_TEST = metric("test_accuracy_batch", 100)


def _figure4(study: Study, seen: Seen) -> list[Check]:
    checks = []
    for words, look, pick, rising, judged, published in (
        ("test accuracy falls with batch size", accuracy, _TEST, False, True, ""),
        (
            "phi(1e-3) rises with batch size",
            study.curvature_and_phi,
            phi(0),
            True,
            True,
            "",
        ),
        (
            "lambda_max with batch size (Yao et al. 2018: rises)",
            study.curvature_and_phi,
            lambda_max,
            True,
            False,
            "0.64 (16) → 80 (2048) for C1, not checked",
        ),
    ):
        x, y = points(seen, look, pick, _swept(study))
        if len(x) >= 3:
            shown = listed(x, y)
            check = trend(words, x, y, rising=rising, ours=shown, judged=judged)
            if look == study.curvature_and_phi and judged:
                best = points(seen, look, phi(0, "phi"), _swept(study))
                check = by_both_solvers(check, trend(words, *best, rising=rising))
            checks.append(replace(check, paper=published))
    return checks


def _figure4_panels(study: Study, seen: Seen) -> list[Panel]:
    panels = []
    for label, look, pick, log in (
        ("test accuracy, %", accuracy, _TEST, False),
        ("phi(1e-3), %", study.curvature_and_phi, phi(0), True),
        ("lambda_max", study.curvature_and_phi, lambda_max, True),
    ):
        x, y = points(seen, look, pick, _swept(study))
        if x:
            panels.append(
                Panel(
                    title="",
                    x_label="batch size",
                    y_label=label,
                    curves=[band("", x, y)],
                    log_x=True,
                    log_y=log,
                    ticks=study.swept,
                )
            )
    return panels


# -- figure 5: warm starts -------------------------------------------------------------


def _warm(study: Study) -> list[tuple[float, Trained]]:
    """(epochs of small batch before, large-batch network); 0 is a cold start."""
    found = []
    for seed in range(study.num_warm):
        found.append((0.0, study.at("large", seed, study.epochs_warm)))
        for epochs in study.epochs_small:
            start = study.at("small", seed, epochs)
            found.append((epochs, study.at("large", seed, study.epochs_warm, start=start)))
    return found


def _figure5_observations(study: Study) -> list[Any]:
    networks = [network for _, network in _warm(study)]
    looks: list[Any] = [Accuracy(of=network) for network in networks]
    looks += [study.phi(network) for network in networks]
    small = [n for run in _followed(study, "small")[: study.num_warm] for n in run]
    return looks + [Accuracy(of=network) for network in small]


def _figure5(study: Study, seen: Seen) -> list[Check]:
    checks = []
    for words, look, pick, rising in (
        ("test accuracy rises with the epochs before", accuracy, _TEST, True),
        ("phi(1e-3) falls with the epochs before", study.phi, phi(0), False),
    ):
        x, y = points(seen, look, pick, _warm(study))
        if len(x) >= 3:
            check = trend(words, x, y, rising=rising, ours=listed(x, y))
            if look == study.phi:
                best = points(seen, look, phi(0, "phi"), _warm(study))
                check = by_both_solvers(check, trend(words, *best, rising=rising))
            checks.append(check)
    return checks


def _figure5_panels(study: Study, seen: Seen) -> list[Panel]:
    small = [
        (network.budget.epochs or 0.0, network)
        for run in _followed(study, "small")[: study.num_warm]
        for network in run
    ]
    panels = []
    for label, look, pick, log in (
        ("test accuracy, %", accuracy, _TEST, False),
        ("phi(1e-3), %", study.phi, phi(0), True),
    ):
        curves = []
        warm = points(seen, look, pick, _warm(study))
        if warm[0]:
            curves.append(band("large batch, warm start", *warm, colour=1))
        before = points(seen, look, pick, small)
        if before[0]:
            curves.append(band("small batch, before", *before, colour=0))
        panels.append(
            Panel(
                title="",
                x_label="epochs of small-batch training before",
                y_label=label,
                curves=curves,
                log_y=log,
            )
        )
    return panels


# -- tables 6 and 7, adversarial training: remedies ------------------------------------


def _remedied(
    study: Study, settings: dict[str, Any], roles: Sequence[Role]
) -> dict[Role, list[Trained]]:
    seeds = range(study.num_remedied)
    return {role: [study.at(role, seed, **settings) for seed in seeds] for role in roles}


def _remedy_observations(
    settings: dict[str, Any], roles: Sequence[Role], study: Study
) -> list[Any]:
    treated = _remedied(study, settings, roles)
    plain = [n for pair in ends(study)[: study.num_remedied] for n in pair]
    networks = [*plain, *(n for networks in treated.values() for n in networks)]
    looks: list[Any] = [Accuracy(of=network) for network in networks]
    looks += [study.sharpness(network) for network in plain]
    return looks + [study.phi(network) for network in treated["large"]]


def _remedy(
    settings: dict[str, Any], roles: Sequence[Role], table: str, study: Study, seen: Seen
) -> list[Check]:
    """Better than the large batch, and still sharper than the small one?"""
    treated = _remedied(study, settings, roles)["large"]
    published = paper_numbers("keskar2017").get(table, {}).get(study.network, {})
    plain = paper_numbers("keskar2017")["table2"].get(study.network, {}).get("test")
    small, large = zip(*ends(study)[: study.num_remedied], strict=True)
    checks = []
    values = pairs(seen, accuracy, _TEST, list(zip(large, treated, strict=True)))
    if values[0]:
        theirs = published.get("test")
        theirs = theirs[1] if table == "table6" and theirs else theirs
        beside = (plain[1], theirs) if plain and theirs else None
        words = "test accuracy of the large batch, %, without → with: "
        gain = paired(f"{words}larger", *values, ratio=False, paper=beside)
        if table == "adversarial":
            gains = [b - a for a, b in zip(*values, strict=True)]
            words += "at most half a point larger"
            verdict = within(words, gains, -100, 0.5).verdict
            gain = replace(gain, claim=words, p=None, flip_p=None, verdict=verdict)
        checks.append(gain)
    words = "phi(1e-3), %, small batch → large batch with it: still larger"
    cells = paper_numbers("keskar2017")["table3"].get(study.network, {}).get("0.001")
    theirs = published.get("0.001")
    found = [
        (a, b)
        for one, other in zip(small, treated, strict=True)
        if (a := seen.get(study.sharpness(one))) and (b := seen.get(study.phi(other)))
    ]
    protocol, best = (
        [(phi(0, name)(a), phi(0, name)(b)) for a, b in found]
        for name in ("phi_protocol", "phi")
    )
    if found:
        beside = (cells[0], theirs) if cells and theirs else None
        check, other = (
            paired(words, *map(list, zip(*values, strict=True)), paper=beside)
            for values in (protocol, best)
        )
        checks.append(by_both_solvers(check, other))
    return checks


def _remedy_item(
    name: str, title: str, claim: str, settings: dict[str, Any], roles: Sequence[Role]
) -> Item:
    return Item(
        name=name,
        title=title,
        claim=claim,
        observations=partial(_remedy_observations, settings, roles),
        checks=partial(_remedy, settings, roles, name),
        in_quick=False,
    )


# -- the paper -------------------------------------------------------------------------

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
    Item(
        name="figure2",
        title="Figure 2: accuracy along training",
        claim="Test accuracy rises and levels off: stopping early would not help.",
        observations=_figure2_observations,
        checks=_figure2,
        panels=_figure2_panels,
    ),
    Item(
        name="figure3",
        title="Figure 3: the line through both minima",
        claim="The loss rises more steeply around the large-batch minimum.",
        observations=partial(_joinings, arc=False),
        checks=partial(_between, False),
        panels=partial(_between_panels, False),
    ),
    Item(
        name="figure4",
        title="Figure 4: accuracy and phi by batch size",
        claim="Beyond a threshold test accuracy falls with the batch size, and phi rises "
        "up to about there.",
        observations=_figure4_observations,
        checks=_figure4,
        panels=_figure4_panels,
        applies=lambda study: bool(study.swept),
        in_quick=False,
    ),
    Item(
        name="figure5",
        title="Figure 5: large batch after a warm start with small batches",
        claim="After enough epochs of small batches the large batch reaches as good and as "
        "flat minima.",
        observations=_figure5_observations,
        checks=_figure5,
        panels=_figure5_panels,
        applies=lambda study: study.epochs_warm > 0,
        in_quick=False,
    ),
    Item(
        name="figure6",
        title="Figure 6: phi against the loss along training",
        claim="As the loss falls phi grows in large-batch training and not in small-batch "
        "training.",
        observations=_figure6_observations,
        checks=_figure6,
        panels=_figure6_panels,
    ),
    Item(
        name="figure7",
        title="Figure 7: the arc through both minima",
        claim="On the arc, too, the loss rises more steeply at the large-batch minimum.",
        observations=partial(_joinings, arc=True),
        checks=partial(_between, True),
        panels=partial(_between_panels, True),
    ),
    _remedy_item(
        "table6",
        "Table 6: data augmentation",
        "Augmentation makes large batches generalise better; their minima stay sharp.",
        {"augmentation": "keskar"},
        ROLES,
    ),
    _remedy_item(
        "table7",
        "Table 7: conservative training",
        "Conservative training makes large batches generalise better; their minima stay "
        "sharp.",
        {"remedy": "conservative"},
        ("large",),
    ),
    _remedy_item(
        "adversarial",
        "Appendix E: adversarial training",
        "Adversarial training does not make large batches generalise better; their minima "
        "stay sharp.",
        {"remedy": "adversarial"},
        ("large",),
    ),
)

_TWO_CORES = "for two cores"
STUDIES = (
    Study(
        name="F1-mnist",
        preset="quick",
        network="F1",
        data="mnist5k",
        reduced="4000 of MNIST's 60 000 training images, 3 starting points for the paper's "
        "5, so that it takes minutes",
        small=32,
        large=400,
        epochs_small=(1, 4, 20),
        epochs_large=(4, 12, 40),
        num_seeds=3,
        num_followed=1,
        swept=(32, 400, 2000),
        epochs_swept=20,
        num_swept=2,
        epochs_warm=20,
        num_warm=1,
        num_remedied=3,
    ),
    Study(
        name="MLP-digits",
        preset="quick",
        network="MLP?width=16&out_features=10",
        data="digits",
        reduced="a tanh network of 1482 parameters: what it says of the paper is little, "
        "but anyone can rerun it in seconds",
        stand_in="digits of 8 x 8 pixels for MNIST, and a network without BatchNorm",
        small=16,
        large=143,
        epochs_small=(2, 8, 30),
        epochs_large=(30, 90, 300),
        num_followed=2,
    ),
    Study(
        name="F1-mnist",
        preset="reduced",
        network="F1",
        data="mnist[5000]",
        reduced=f"5000 of MNIST's 60 000 training images, {_TWO_CORES}; large batch 10 % "
        "as in the paper, small batch 32",
        small=32,
        large=500,
        epochs_small=(1, 2, 4, 8, 14, 20),
        epochs_large=(2, 5, 10, 20, 40, 60),
        swept=(32, 100, 250, 500, 1000, 2500),
        epochs_swept=40,
        epochs_warm=40,
    ),
    Study(
        name="F1-fashion-mnist",
        preset="reduced",
        network="F1",
        data="fashion-mnist[5000]",
        reduced=f"5000 of 60 000 training images, {_TWO_CORES}",
        stand_in="Fashion-MNIST for MNIST, to see whether it carries over",
        small=32,
        large=500,
        epochs_small=(1, 2, 4, 8, 14, 20),
        epochs_large=(2, 5, 10, 20, 40, 60),
        swept=(32, 100, 250, 500, 1000, 2500),
        epochs_swept=40,
        num_swept=2,
        epochs_warm=40,
        num_warm=2,
    ),
    Study(
        name="C1-cifar10",
        preset="reduced",
        network="C1",
        data="cifar10[2000,test=2000]",
        reduced=f"2000 of CIFAR-10's 50 000 training and of its test images, {_TWO_CORES}; "
        "large batch 10 % as in the paper, small batch 16; sharpness on 100 samples",
        small=16,
        large=200,
        epochs_small=(1, 2, 4, 8, 11, 15),
        epochs_large=(2, 5, 10, 20, 30),
        num_followed=2,
        num_samples=100,
        swept=(16, 64, 200, 1000),
        epochs_swept=20,
        num_swept=2,
        epochs_warm=15,
        num_warm=1,
    ),
    Study(
        name="F2-spoken-digits",
        preset="reduced",
        network="F2",
        data="spoken-digits[12000,test=4800]",
        reduced=f"12 000 of 116 967 frames, {_TWO_CORES}",
        stand_in="spoken digits for TIMIT, which is licensed",
        small=64,
        large=1200,
        epochs_small=(2, 8),
        epochs_large=(5, 25),
    ),
    *(
        Study(
            name=f"{network}-{data}",
            preset="full",
            network=network,
            data=data,
            stand_in=stand_in,
            small=256,
            large=large,
            epochs_small=(1, 2, 5, 10, 20, 50, 100),
            epochs_large=(1, 2, 5, 10, 20, 50, 100),
            num_seeds=6,
            num_samples=samples,
            swept=(64, 256, 512, 1024, 2048, 5000),
            epochs_swept=100,
            epochs_warm=100,
        )
        for network, data, large, samples, stand_in in (
            ("F1", "mnist", 6000, None, None),
            ("C1", "cifar10", 5000, None, None),
            ("C2", "cifar10", 5000, 5000, None),
            ("C3", "cifar100", 5000, None, None),
            ("C4", "cifar100", 5000, 5000, None),
            ("F2", "spoken-digits", 11696, None, "spoken digits for TIMIT, licensed"),
        )
    ),
)

PAPER = Paper(
    name="keskar2017",
    citation="Keskar, Mudigere, Nocedal, Smelyanskiy, Tang (2017), On Large-Batch Training "
    "for Deep Learning: Generalization Gap and Sharp Minima, arXiv:1609.04836",
    items=ITEMS,
    studies=STUDIES,
)
