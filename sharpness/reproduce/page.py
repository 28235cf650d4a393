"""`python -m sharpness.reproduce.page`: records -> docs/reproductions.md.

The page's sentences, tables and pictures follow from the committed records alone: nothing
is trained or measured here. What stands between the markers is written anew, the rest is
left as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby, product
from pathlib import Path

from sharpness import _command
from sharpness.record import append_record, read_records
from sharpness.report.panels import draw
from sharpness.reproduce.answer import draw_answer, lead, sentences
from sharpness.reproduce.claims import Finding, Role, counts_of, with_holm
from sharpness.reproduce.paper import Item, Paper, Study, finding
from sharpness.reproduce.papers import PAPERS
from sharpness.reproduce.runner import ObservationStore
from sharpness.reproduce.shown import by_study, finding_text, markdown

_BEGIN, _END = "<!-- {0}:begin -->", "<!-- {0}:end -->"
ANSWER, ITEMS = "answer", "items"
PICTURE = "answer.png"
Found = tuple[Paper, Item, Study, Finding]


def findings(store: ObservationStore) -> list[Found]:
    """Of every item of every study that something was found on, in order.

    What is computed without observations is shown once, for the paper's own sizes.
    """
    found = [
        (paper, item, study, finding(paper, item, study, store))
        for paper in PAPERS.values()
        for item, study in product(paper.items, paper.studies)
        if _is_begun(paper, item, study, store)
    ]
    found = [row for row in found if any(c.role is not Role.PREMISE for c in row[3].checks)]
    adjusted = with_holm([one for *_, one in found])
    return [(*row[:3], one) for row, one in zip(found, adjusted, strict=True)]


def _is_begun(paper: Paper, item: Item, study: Study, store: ObservationStore) -> bool:
    if not item.applies(study):
        return False
    wanted = item.observations(study)
    return any(one in store for one in wanted) if wanted else study is paper.studies[-1]


def recorded(folder: Path) -> ObservationStore:
    """All observations in a folder's record files."""
    return ObservationStore(
        [record for file in sorted(folder.glob("*.jsonl")) for record in read_records(file)]
    )


def answer_text(store: ObservationStore, found: Sequence[Found]) -> str:
    """The first screen: in short, in six sentences, in a picture; a table of papers."""
    answers = "\n".join(f"- {sentence}" for sentence in sentences(store))
    alt = "Sharpness, test accuracy and distance of large- against small-batch networks"
    rows = []
    for paper, of_paper in groupby(found, key=lambda row: row[0]):
        told = [one for *_, one in of_paper]
        own = counts_of(one.outcome for one in told if one.stand_in is None)
        others = counts_of(one.outcome for one in told if one.stand_in)
        counts = (", ".join(parts) or "–" for parts in (own, others))
        rows.append((f"[{paper.name}](#{paper.name})", paper.says, *counts))
    heads = ("paper", "what it says", "our verdicts", "on data in place of the paper's")
    about = (
        "Verdicts on every table and figure, each on every network. Premise not met: one "
        "network has not fitted its training set, so that nothing can be compared."
    )
    picture = f"![{alt}](reproductions/{PICTURE})"
    return "\n\n".join([lead(store), answers, picture, about, markdown(heads, rows)])


def items_text(store: ObservationStore, found: Sequence[Found]) -> str:
    """Every paper: its verdicts, what was run on what, every item, what was not run."""
    parts = []
    for paper, rows in groupby(found, key=lambda row: row[0]):
        of_paper = list(rows)
        studies = dict.fromkeys(study for _, _, study, _ in of_paper)
        parts.append(f"## {paper.name}\n\n{paper.citation}.")
        parts.append(by_study([one for *_, one in of_paper]))
        parts.append("\n".join(map(_study_text, studies)))
        for _, item, study, one in of_paper:
            shown = _picture(item, study, store)
            parts.append(finding_text(one, f"reproductions/{shown}" if shown else None))
        parts.append(_not_run(paper, store))
    return "\n\n".join(part.rstrip() for part in parts)


def _not_run(paper: Paper, store: ObservationStore) -> str:
    """Of the larger presets the items of which nothing has been observed."""
    rows = []
    for study in paper.studies:
        items = [item for item in paper.items if item.applies(study)]
        wanted = {
            item.name: item.observations(study)
            for item in items
            if study.preset != "quick" and not _is_begun(paper, item, study, store)
        }
        looks = {one for observations in wanted.values() for one in observations}
        runs = {network.run for one in looks for network in one.needs}
        tracked = sum(not one.needs for one in looks)
        if looks:
            where = f"{study.name}, {study.preset}"
            rows.append(
                (where, ", ".join(wanted), str(len(runs) + tracked), str(len(looks)))
            )
    columns = ("not run on", "items", "trainings that it takes", "observations")
    return f"### {paper.name}: not run\n\n{markdown(columns, rows)}" if rows else ""


def _study_text(study: Study) -> str:
    sizes = f"Reduced: {study.reduced}." if study.reduced else "The paper's sizes."
    stand_in = f" Stand-in: {study.stand_in}." if study.stand_in else ""
    where = f"**{study.name}, {study.preset}**: {study.network} on {study.data}."
    return f"- {where} {study.about} {sizes}{stand_in}".replace("  ", " ")


def between(text: str, marker: str, content: str) -> str:
    """The text with what stands between its markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    begin, end = _BEGIN.format(marker), _END.format(marker)
    if begin not in text or end not in text:
        raise ValueError(f"`{marker}` must be marked by {begin} and {end}; got neither.")
    head, rest = text.split(begin, 1)
    return f"{head}{begin}\n\n{content}\n\n{end}{rest.split(end, 1)[1]}"


def _picture(item: Item, study: Study, store: ObservationStore) -> str | None:
    drawn = item.drawn(study, store)
    return f"{item.name}-{study.name}-{study.preset}.png" if drawn else None


def _draw_pictures(folder: Path, store: ObservationStore, found: Sequence[Found]) -> None:
    """The answer's picture and every item's; what was drawn for others goes."""
    stale = set(folder.glob("*.png")) - {draw_answer(folder / PICTURE, store)}
    for paper, item, study, _ in found:
        if name := _picture(item, study, store):
            title = f"{paper.name}, {item.title} · {study.network} on {study.data}"
            stale.discard(draw(folder / name, item.drawn(study, store), title=title))
    for path in stale:
        path.unlink()


def _merge(source: Path, target: Path) -> int:
    """Add the observations that are not there yet; how many."""
    there = ObservationStore(read_records(target) if target.exists() else ())
    given = (record for record in read_records(source) if record.get("digest"))
    new = [record for record in given if not there.has(record["digest"])]
    for record in new:
        append_record(target, record)
    target.with_name(target.name + ".lock").unlink(missing_ok=True)
    return len(new)


def _parser() -> _command.Parser:
    parser = _command.Parser(
        prog="python -m sharpness.reproduce.page",
        description="Write docs/reproductions.md and its pictures from the records in "
        "docs/reproductions.",
    )
    parser.add_argument(
        "records", nargs="*", type=Path, help="run folders to take in first"
    )
    parser.add_argument("--root", type=Path, default=Path(), help="of the project")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return _command.run(_parser(), arguments, _write)


def _write(options: argparse.Namespace) -> int:
    folder = options.root / "docs" / "reproductions"
    page = options.root / "docs" / "reproductions.md"
    for run in options.records:
        kept = folder / f"{run.name.removeprefix('reproduce-')}.jsonl"
        print(f"{kept}: {_merge(run / 'records.jsonl', kept)} observations added")
    store = recorded(folder)
    page.write_text(written(page.read_text(encoding="utf-8"), store), encoding="utf-8")
    _draw_pictures(folder, store, findings(store))
    return _command.OK


def written(text: str, store: ObservationStore) -> str:
    """A page's text with its generated parts made anew."""
    found = findings(store)
    text = between(text, ANSWER, answer_text(store, found))
    return between(text, ITEMS, items_text(store, found))


if __name__ == "__main__":
    sys.exit(main())
