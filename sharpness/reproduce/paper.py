"""What a paper is here: items with claims, and studies that they are tried on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from typing import Any, Self

from sharpness.lab.training import StoppingCriteria, Training
from sharpness.report.figures import Figure
from sharpness.report.panels import Panel
from sharpness.reproduce import Preset
from sharpness.reproduce.claims import Check, Finding
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.observations import Observation
from sharpness.reproduce.runner import ObservationStore


@dataclass(frozen=True, kw_only=True)
class Study:
    """A network on a data set, at the sizes of a preset: what an item is tried on."""

    name: str
    preset: Preset
    network: str
    data: str
    reduced: str = ""  # what is smaller than in the paper, and why
    stand_in: str | None = None  # for what cannot be had
    num_seeds: int = 6  # starting points
    seen: int = 0  # of them, when predicates were changed

    @property
    def about(self) -> str:
        """How the networks were trained and measured, in sentences."""
        return ""

    @property
    def has_papers_size(self) -> bool:
        """Whether sizes of effects can be held to the paper's."""
        return not self.reduced and not self.stand_in

    @property
    def seeds(self) -> range:
        """Starting points."""
        return range(self.num_seeds)

    def trained(
        self,
        epochs: float,
        start: ModelSpec | None = None,
        until_loss_of: ModelSpec | None = None,
        **settings: Any,
    ) -> ModelSpec:
        """Its network after so many epochs on its data; `settings` of the `Training`."""
        return ModelSpec(
            data=self.data,
            training=Training(**{"network": self.network, **settings}),
            budget=StoppingCriteria(epochs=epochs),
            start=start,
            until_loss_of=until_loss_of,
        )

    def with_seeds(self, num: int) -> Self:
        """The same with so many starting points, everywhere."""
        return replace(self, num_seeds=num)


@dataclass(frozen=True, kw_only=True)
class Item:
    """A table or figure: what must be observed, and what follows from it."""

    name: str
    title: str
    claim: str
    observations: Callable[[Any], Sequence[Observation]]
    checks: Callable[[Any, ObservationStore], Iterable[Check]]
    panels: Callable[[Any, ObservationStore], Sequence[Panel]] | None = None
    applies: Callable[[Any], bool] = lambda study: True
    in_quick: bool = True  # done by the quick preset without being named
    all_or_none: bool = False  # nothing follows before everything has been observed

    def checked(self, study: Any, store: ObservationStore) -> list[Check]:
        """Its checks of which something has been observed."""
        checks = self.checks(study, store) if self._ready(study, store) else ()
        return [check for check in checks if check.n]

    def drawn(self, study: Any, store: ObservationStore) -> list[Panel]:
        """Its panels that show something."""
        ready = self._ready(study, store)
        panels = self.panels(study, store) if self.panels and ready else ()
        return [panel for panel in panels if panel.curves]

    def _ready(self, study: Any, store: ObservationStore) -> bool:
        return not self.all_or_none or all(o in store for o in self.observations(study))


@dataclass(frozen=True, kw_only=True)
class InShort:
    """A paper's question answered by little work: sentences, one table, one picture."""

    about: Callable[[Any], str]
    observations: Callable[[Any], Sequence[Observation]]
    sentences: Callable[[Any, ObservationStore], Sequence[str]]
    columns: Sequence[str]
    rows: Callable[[Any, ObservationStore], Sequence[Sequence[str]]]
    figure: Callable[[Any, ObservationStore], Figure]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper with its main claim, its items and the studies of every preset."""

    name: str
    citation: str
    says: str
    items: Sequence[Item]
    studies: Sequence[Study] = field(repr=False)
    in_short: InShort | None = field(default=None, repr=False)

    def item(self, name: str) -> Item:
        """An item by its name.

        Raises:
            ValueError: there is none.
        """
        by_name = {item.name: item for item in self.items}
        if name not in by_name:
            raise ValueError(f"`--items` must be of {', '.join(by_name)}; got {name!r}.")
        return by_name[name]


def finding(paper: Paper, item: Item, study: Study, store: ObservationStore) -> Finding:
    """What has been found on an item so far."""
    wanted = list(dict.fromkeys(item.observations(study)))
    lost = sum(map(store.diverged, wanted))
    notes = [f"{lost} of {len(wanted)} observations: training diverged."] if lost else []
    usual = {(s.name, s.preset): s.num_seeds for s in paper.studies}
    other = study.num_seeds != usual[study.name, study.preset]
    seeds = f" --seeds {study.num_seeds}" if other else ""
    return Finding(
        paper=paper.name,
        item=item.name,
        title=item.title,
        claim=item.claim,
        study=study.name,
        data=study.data,
        preset=study.preset,
        command=f"python -m sharpness.reproduce {paper.name} --items {item.name} "
        f"--preset {study.preset} --study {study.name}{seeds}",
        stand_in=study.stand_in if wanted else None,
        made=sum(observation in store for observation in wanted),
        wanted=len(wanted),
        checks=item.checked(study, store),
        notes=notes,
    )


@cache
def paper_numbers(name: str) -> dict[str, Any]:
    """Published numbers, from `paper_numbers/NAME.json`."""
    source = files("sharpness.reproduce") / "paper_numbers" / f"{name}.json"
    numbers: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    return numbers
