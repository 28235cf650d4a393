"""Tables 6 and 7 and adversarial training: remedies for large batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from sharpness.reproduce.claims import Check, Role, paired, within
from sharpness.reproduce.columns import accuracy, by_solvers, observed, pairs
from sharpness.reproduce.keskar2017.study import TEST_ACCURACY, KeskarStudy, flat
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.observations import Observation
from sharpness.reproduce.paper import Item
from sharpness.reproduce.runner import ObservationStore


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


ITEMS = (
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
