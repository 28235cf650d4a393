"""Tables 6 and 7 and adversarial training: remedies for large batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from sharpness.reproduce.claims import Check, by_both_solvers, paired, within
from sharpness.reproduce.columns import accuracy, pairs, phi
from sharpness.reproduce.keskar2017.study import (
    ROLES,
    TEST_ACCURACY,
    KeskarStudy,
    Role,
    ends,
)
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.observations import Accuracy
from sharpness.reproduce.paper import Item
from sharpness.reproduce.runner import ObservationStore


def _remedied(
    study: KeskarStudy, settings: dict[str, Any], roles: Sequence[Role]
) -> dict[Role, list[ModelSpec]]:
    seeds = range(study.num_remedied)
    return {role: [study.at(role, seed, **settings) for seed in seeds] for role in roles}


def _remedy_observations(
    settings: dict[str, Any], roles: Sequence[Role], study: KeskarStudy
) -> list[Any]:
    treated = _remedied(study, settings, roles)
    plain = [n for pair in ends(study)[: study.num_remedied] for n in pair]
    networks = [*plain, *(n for networks in treated.values() for n in networks)]
    looks: list[Any] = [Accuracy(of=network) for network in networks]
    looks += [study.sharpness(network) for network in plain]
    return looks + [study.phi(network) for network in treated["large"]]


def _remedy(
    settings: dict[str, Any],
    roles: Sequence[Role],
    table: str,
    study: KeskarStudy,
    store: ObservationStore,
) -> list[Check]:
    """Better than the large batch, and still sharper than the small one?"""
    treated = _remedied(study, settings, roles)["large"]
    published = study.published(table) or {}
    plain = (study.published("table2") or {}).get("test")
    small, large = zip(*ends(study)[: study.num_remedied], strict=True)
    checks = []
    values = pairs(store, accuracy, TEST_ACCURACY, list(zip(large, treated, strict=True)))
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
    cells = (study.published("table3") or {}).get("0.001")
    theirs = published.get("0.001")
    networks = list(zip(small, treated, strict=True))
    protocol, best = (
        pairs(store, study.sharpness, phi(0, name), networks, study.phi)
        for name in ("phi_protocol", "phi")
    )
    if protocol[0]:
        beside = (cells[0], theirs) if cells and theirs else None
        check, found = (paired(words, *v, paper=beside) for v in (protocol, best))
        checks.append(by_both_solvers(check, found))
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


ITEMS = (
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
