"""`python -m sharpness.reproduce.page`: records -> docs/reproductions.md and README.

The page's tables and pictures follow from the committed records alone: nothing is
trained or measured here. What stands between the markers is written anew, the rest is
left as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby, product
from pathlib import Path

from sharpness import _command
from sharpness.record import append_record, parsed, read_records
from sharpness.report.panels import draw
from sharpness.reproduce.claims import Finding
from sharpness.reproduce.paper import Item, Paper, Study, finding
from sharpness.reproduce.papers import PAPERS
from sharpness.reproduce.runner import ObservationStore
from sharpness.reproduce.shown import by_study, finding_text, summary
from sharpness.reproduce.upgrade import upgraded

_BEGIN, _END = "<!-- {0}:begin -->", "<!-- {0}:end -->"
MARKER = "reproductions"


def findings(store: ObservationStore) -> Iterator[tuple[Paper, Item, Study, Finding]]:
    """Of every item of every study that something was found on, in order.

    What is computed without observations is shown once, for the paper's own sizes.
    """
    for paper in PAPERS.values():
        for item, study in product(paper.items, paper.studies):
            wanted = item.observations(study) if item.applies(study) else [None]
            counted = not wanted and study is paper.studies[-1]
            if counted or any(one in store for one in wanted if one is not None):
                found = finding(paper, item, study, store)
                if found.checks:
                    yield paper, item, study, found


def recorded(folder: Path) -> ObservationStore:
    """All observations in a folder's record files."""
    return ObservationStore(
        [record for file in sorted(folder.glob("*.jsonl")) for record in read_records(file)]
    )


def page_text(store: ObservationStore) -> str:
    """The generated part of the page: a summary, then every item."""
    found = list(findings(store))
    parts = [_verdicts([one for *_, one in found])]
    for paper, rows in groupby(found, key=lambda row: row[0]):
        of_paper = list(rows)
        studies = dict.fromkeys(study for _, _, study, _ in of_paper)
        parts.append(f"## {paper.name}\n\n{paper.citation}.")
        parts.append("\n".join(map(_study_text, studies)))
        for _, item, study, one in of_paper:
            shown = _picture(item, study, store)
            parts.append(finding_text(one, f"reproductions/{shown}" if shown else None))
    return "\n\n".join(part.rstrip() for part in parts)


def _study_text(study: Study) -> str:
    sizes = f"Reduced: {study.reduced}." if study.reduced else "The paper's sizes."
    stand_in = f" Stand-in: {study.stand_in}." if study.stand_in else ""
    where = f"**{study.name}, {study.preset}**: {study.network} on {study.data}."
    return f"- {where} {study.about} {sizes}{stand_in}".replace("  ", " ")


def readme_text(store: ObservationStore) -> str:
    """The generated part of README: the verdicts, without the quick preset."""
    return _verdicts([one for *_, one in findings(store) if one.preset != "quick"])


def _verdicts(found: Sequence[Finding]) -> str:
    """A table of its own for each paper whose items were tried on several studies."""
    papers = [list(rows) for _, rows in groupby(found, key=lambda one: one.paper)]
    wide = [rows for rows in papers if len({one.title for one in rows}) < len(rows)]
    rest = [one for rows in papers if rows not in wide for one in rows]
    return "\n\n".join([*map(by_study, wide), *([summary(rest)] if rest else [])])


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


def _draw_pictures(folder: Path, store: ObservationStore) -> None:
    """Every item's picture; what was drawn for others goes."""
    stale = set(folder.glob("*.png"))
    for paper, item, study, _ in findings(store):
        if name := _picture(item, study, store):
            title = f"{paper.name}, {item.title} · {study.network} on {study.data}"
            stale.discard(draw(folder / name, item.drawn(study, store), title=title))
    for path in stale:
        path.unlink()


def _merge(source: Path, target: Path) -> int:
    """Add the observations that are not there yet; how many."""
    there = ObservationStore(read_records(target) if target.exists() else ())
    given = (record for record in parsed(source) if record.get("digest"))
    new = [upgraded(record) for record in given if not there.has(record["digest"])]
    for record in new:
        append_record(target, record)
    target.with_name(target.name + ".lock").unlink(missing_ok=True)
    return len(new)


def _parser() -> _command.Parser:
    parser = _command.Parser(
        prog="python -m sharpness.reproduce.page",
        description="Write docs/reproductions.md, its pictures and README's table from "
        "the records in docs/reproductions.",
    )
    parser.add_argument(
        "records", nargs="*", type=Path, help="run folders to take in first"
    )
    parser.add_argument("--root", type=Path, default=Path(), help="of the project")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)

    def command() -> int:
        folder = options.root / "docs" / "reproductions"
        page, readme = (
            options.root / "docs" / "reproductions.md",
            options.root / "README.md",
        )
        for run in options.records:
            kept = folder / f"{run.name.removeprefix('reproduce-')}.jsonl"
            print(f"{kept}: {_merge(run / 'records.jsonl', kept)} observations added")
        store = recorded(folder)
        for path, content in ((page, page_text(store)), (readme, readme_text(store))):
            text = path.read_text(encoding="utf-8")
            path.write_text(between(text, MARKER, content), encoding="utf-8")
        _draw_pictures(folder, store)
        return _command.OK

    return _command.guarded("sharpness.reproduce.page", command)


if __name__ == "__main__":
    sys.exit(main())
