"""What `python -m sharpness.reproduce --report` writes: ours beside the paper's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeAlias

from sharpness._pages import how
from sharpness.report.page import Block, Cell, Picture, Section, Table, write_page
from sharpness.report.panels import Panel, panels_figure
from sharpness.reproduce.claims import Finding
from sharpness.reproduce.paper import Item, Paper, Study
from sharpness.reproduce.runner import ObservationStore
from sharpness.reproduce.shown import COLUMNS, VERDICTS, cells, premises, tested, verdicts

Found: TypeAlias = tuple[Item, Study, Finding]

_ALWAYS = [
    "Whether it holds for other networks, data and settings than those named here.",
    "What the paper measured and no item here asks for.",
]


def findings_page(
    path: str | Path,
    paper: Paper,
    found: Sequence[Found],
    store: ObservationStore,
    failures: Sequence[str],
    advice: str,
    asked: str,
) -> Path:
    """Every item with its claim, the paper's number beside ours, and the verdict.

    Args:
        path: of the page.
        paper: that was reproduced.
        found: its items on their studies, with what was found.
        store: the observations.
        failures: what could not be done, and why.
        advice: how to read p and verdicts.
        asked: the command.
    """
    findings = [finding for *_, finding in found]
    table = Table(caption="Verdicts", columns=VERDICTS, rows=verdicts(findings))
    wanted = [o for item, study, _ in found for o in item.observations(study)]
    records = store.records(wanted)
    studies = dict.fromkeys(study for _, study, _ in found)
    sections = [
        Section(title="Verdicts", blocks=[f"{paper.citation}.", table]),
        *(_item(item, study, finding, store) for item, study, finding in found),
        Section(title="How to read it", blocks=[advice]),
        _trained(studies),
        how(records, asked),
        _missing(paper, {item.name for item, *_ in found}, studies, failures),
    ]
    return write_page(path, f"{paper.name}: ours beside theirs", sections, records)


def answer_page(
    path: str | Path, paper: Paper, study: Study, store: ObservationStore, asked: str
) -> Path:
    """The paper's question in short: sentences, one picture, one table.

    Args:
        path: of the page.
        paper: one that has a question in short.
        study: what it was tried on.
        store: the observations.
        asked: the command.
    """
    question = paper.in_short
    assert question is not None
    sentences = list(question.sentences(study, store))
    caption = question.about(study)
    rows = question.rows(study, store)
    columns = ("quantity", *question.columns[1:])  # a column that is sorted has a name
    table = Table(caption=caption, columns=columns, rows=rows)
    alt = f"Ratios of both batches. {' '.join(sentences)} The table below has the numbers."
    picture = Picture(figure=question.figure(study, store), alt=alt, table=table)
    records = store.records(question.observations(study))
    sections = [
        Section(title="The answer", blocks=[f"{paper.citation}.", sentences, picture]),
        _trained([study]),
        how(records, asked),
        _missing(paper, set(), [study], store.failed),
    ]
    return write_page(path, f"{paper.name}, in short", sections, records)


# -- parts -----------------------------------------------------------------------------


def _item(item: Item, study: Study, finding: Finding, store: ObservationStore) -> Section:
    verdict = finding.verdict_text
    blocks: list[Block] = [
        finding.claim,
        f"{verdict[:1].upper()}{verdict[1:]}.",
        *premises(finding),
    ]
    if checks := tested(finding):
        rows = [cells(check) for check in checks]
        blocks.append(Table(caption="Claim by claim", columns=COLUMNS, rows=rows))
    if panels := item.drawn(study, store):
        blocks.append(_picture(panels, f"{item.title} · {study.network} on {study.data}"))
    if finding.notes:
        blocks.append(finding.notes)
    title = f"{finding.title} · {finding.study}, {finding.preset}"
    return Section(title=title, blocks=[*blocks, f"By itself: {finding.command}"])


def _picture(panels: Sequence[Panel], title: str) -> Picture:
    """The panels, and a row for each of their points, with its range where one has it."""
    pairs = [(panel, curve) for panel in panels for curve in panel.curves]
    ranged = any(curve.low is not None for _, curve in pairs)
    rows: list[list[Cell]] = []
    for panel, curve in pairs:
        name, none = curve.label or panel.title or "–", [math.nan] * len(curve.x)
        for x, y, *ends in zip(
            curve.x, curve.y, curve.low or none, curve.high or none, strict=True
        ):
            shown = map(float, ends if ranged else ())
            rows.append([name, panel.x_label, float(x), panel.y_label, float(y), *shown])
    columns = ("curve", "against", "at", "what", "value", "least", "largest")
    names = ", ".join(dict.fromkeys(str(row[0]) for row in rows))
    what = ", ".join(dict.fromkeys(panel.y_label for panel in panels))
    alt = f"{title}: {what}, of {names}. The table below has every point."
    shown_columns = columns if ranged else columns[:-2]
    table = Table(caption=f"{title}, point by point", columns=shown_columns, rows=rows)
    return Picture(figure=panels_figure(panels, title=title), alt=alt, table=table)


def _trained(studies: Iterable[Study]) -> Section:
    """Every network with its data, and what was smaller than the paper's."""
    told: dict[str, str] = {}
    for study in studies:
        sizes = f"Reduced: {study.reduced}." if study.reduced else "The paper's sizes."
        stand_in = f"Stand-in: {study.stand_in}." if study.stand_in else ""
        words = (f"{study.network} on {study.data}.", study.about, sizes, stand_in)
        told[f"{study.name}, {study.preset}"] = " ".join(filter(None, words))
    return Section(title="What was trained", blocks=[told])


def _missing(
    paper: Paper, shown: set[str], studies: Iterable[Study], failures: Sequence[str]
) -> Section:
    """Items and studies of this paper that were left out, and what no item tells."""
    items = {item.name: item.title for item in paper.items if item.name not in shown}
    done = {(study.name, study.preset) for study in studies}
    others = {
        f"{study.name}, {study.preset}": f"{study.network} on {study.data}"
        for study in paper.studies
        if (study.name, study.preset) not in done
    }
    blocks: list[Block] = [_ALWAYS]
    if failures:
        blocks += ["Tried, and not done:", list(failures)]
    if items:
        blocks += ["Items, to be had by --items NAME:", items]
    if others:
        blocks += ["Studies, to be had by --preset and --study:", others]
    return Section(title="What was not measured", blocks=blocks)
