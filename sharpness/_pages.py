"""What the commands write for `--report`: results, definitions, and what is missing."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sharpness import _command
from sharpness._arguments import ensure
from sharpness._results import Result, Results, Status
from sharpness._saving import restored
from sharpness.measures.registry import FAMILIES, MEASURES, TRACKED
from sharpness.report import tables
from sharpness.report.page import (
    Block,
    Picture,
    Section,
    Table,
    facts_table,
    readings_table,
    write_page,
)
from sharpness.results import readings_of
from sharpness.statistics import ReadingComparison
from sharpness.tracking import TrackedPoint, tracked_rows

Record = Mapping[str, Any]

_MOST_NAMED = 20  # numbers in the words for a picture
_ALWAYS = [
    "Other starting points: one training says nothing of how much the numbers vary from "
    "one to the next.",
    "Whether the network generalises: no number here is about data that were not given.",
]
_OF_A_PLANE = {
    "What is drawn": "The mean loss f, and the accuracy, at θ + x u + y v, with θ the "
    "parameters of the checkpoint; dashed, the quadratic model from slope and curvature "
    "at θ. Where f is no number there is hatching.",
    "What it does not say": "One or two directions of all that there are. Along random "
    "ones the curvature is near the mean of the eigenvalues, far below lambda_max; the "
    "width of a valley depends on how the directions are scaled.",
}
_OF_A_PATH = {
    "What is drawn": "Loss and accuracy along a bent path between two networks, and the "
    "loss on the straight line.",
    "What it does not say": "A barrier is the largest rise at the points that were looked "
    "at, so a lower bound; a low path is one that was found, and that none was found does "
    "not show that there is none.",
}
_OF_TRACKS = {
    "What is drawn": "Each measure along training, with its error, above the loss; on the "
    "samples that the tracker holds, not on each mini-batch.",
    "Stability threshold": "What the optimizer's rate eta bears: full-batch gradient "
    "descent drives lambda_max up to 2 / eta and keeps it there (Cohen et al. 2021), Adam "
    "the preconditioned one up to 38 / eta (2022); with mini-batches it stays below.",
}
_UNTRACKED = "--track NAME measures on the way; a finished run is not trained anew."
_BETWEEN = [
    "What happened between two points: a peak between them is not seen.",
    "The samples of the training set that the tracker does not hold.",
]
_OF_ADVICE = {
    "Target": "The validation loss that every size is trained to.",
    "Updates, seconds": "Those to the target. 'Measured' were counted in the race; what "
    "was compared are updates by the fitted law S + E / B, or those that were counted "
    "where it does not fit, times the measured seconds per update.",
    "What it does not say": "Whether the larger batch generalises as well beyond the "
    "target, and what holds after it.",
}


def report(command: str, path: str | None, make: Callable[..., Path], *shown: Any) -> None:
    """Write the page that `--report` asks for, if it does, and say so on stderr.

    Args:
        command: that says it.
        path: of the page; None where none was asked for.
        make: one of the functions below.
        shown: what it takes behind the path.
    """
    if path is not None:
        _command.say(command, f"{make(path, *shown)} written")


def measurement_page(path: str | Path, found: Sequence[Any]) -> Path:
    """The page of `measure`: one checkpoint, or several.

    Args:
        path: of the page.
        found: of each the `Measurement`.
    """
    records = [each.record for each in found]
    paths = [record["checkpoint"]["path"] for record in records]
    names = list(dict.fromkeys(name for each in found for name in each.summary.results))
    sections = [
        *(_checkpoint(each) for each in found),
        *(_measure(name, found) for name in names),
        how(records, _repeated(path, records)),
        _missing(names, records),
    ]
    one = f"How sharp is {Path(paths[0]).name}?"
    title = one if len(paths) == 1 else f"How sharp are {len(paths)} checkpoints?"
    return write_page(path, title, sections, records)


def comparison_page(
    path: str | Path,
    groups: Sequence[Sequence[Record]],
    rows: Sequence[ReadingComparison],
    gaps: Sequence[float | None],
    names: tuple[str, str],
) -> Path:
    """The page of `compare`.

    Args:
        path: of the page.
        groups: records of the first and of the second side, in pairs.
        rows: each measure's comparison.
        gaps: generalisation gap of each record.
        names: of the sides.
    """
    from sharpness.report.figures import comparison_plot

    records = [record for group in groups for record in group]
    measured = list(
        dict.fromkeys(name for record in records for name in record["measures"])
    )
    verdicts = [f"{row.name}: {row.verdict}" for row in rows]
    cells = [_compared(row) for row in rows]
    sides = tables.comparison_title(*groups)
    table = Table(
        caption=" · ".join(sides.splitlines()), columns=tables.COMPARED, rows=cells
    )
    figure = comparison_plot(rows, names)
    ratios = Picture(figure=figure, alt=_named("Ratios", verdicts), table=table)
    notes = tables.comparison_notes(rows, gaps)
    of_measures = {
        name: f"{_sentence(MEASURES[name].definition)} {MEASURES[name].caveat}"
        for name in measured
    }
    shown = [_of_record(record) for record in records]
    sections = [
        Section(title="Second against first", blocks=[*sides.splitlines(), ratios, notes]),
        Section(title="What the measures are, and do not say", blocks=[of_measures]),
        Section(
            title="Each checkpoint", blocks=[part for parts in shown for part in parts]
        ),
        how(records, _repeated(path, records)),
        _missing(measured, records),
    ]
    return write_page(path, "Which of the two is sharper?", sections, records)


def landscape_page(path: str | Path, found: Result, record: Record, asked: str) -> Path:
    """The page of `landscape`: a line, a plane or a path; `asked` is the command."""
    about = _OF_A_PATH if type(found).__name__ == "LowLossPath" else _OF_A_PLANE
    name = Path(record["checkpoint"]["path"]).name
    missing = [
        "Every other direction in the space of the parameters.",
        "Every measure of curvature and of phi but those above: python -m "
        f"sharpness.measure {record['checkpoint']['path']} gives them.",
        *_ALWAYS,
    ]
    sections = [
        Section(
            title="The loss around it", blocks=[tables.headline(record), *_result(found)]
        ),
        Section(title="How to read it", blocks=[about]),
        how([record], asked),
        Section(title="What was not measured", blocks=[missing]),
    ]
    return write_page(path, f"What surrounds {name}?", sections, [record])


def advice_page(path: str | Path, found: Any, record: Record, asked: str) -> Path:
    """The page of `batchsize`; `asked` is the command."""
    answer, *words = [line for line in str(found).splitlines() if line]
    words = [line for line in words if not line.startswith("What this cannot tell")]
    missing = [*map(_sentence, (*found.unknown, *found.notes))]
    sections = [
        Section(title="The answer", blocks=[answer, words]),
        Section(title="The numbers", blocks=_result(found)),
        Section(title="How to read them", blocks=[_OF_ADVICE]),
        how([record], asked),
        Section(title="What was not measured", blocks=[missing]),
    ]
    return write_page(path, "Which batch size?", sections, [record])


def training_page(
    path: str | Path,
    runs: Table,
    failures: Mapping[str, str],
    records: Sequence[Record],
    asked: str,
) -> Path:
    """The page of `train`: every run, and what was tracked on its way.

    Args:
        path: of the page.
        runs: the clocks and the end of each finished run.
        failures: why a run has no end, by its path.
        records: of the trainings, and those of tracked points, each point once.
        asked: the command.
    """
    tracks: dict[str, list[TrackedPoint]] = {}
    for record in records:
        if record["kind"] == "tracking":
            point = restored(TrackedPoint, record["point"])
            tracks.setdefault(record["path"], []).append(point)
    tracked = [name for name in TRACKED if any(_has(name, t) for t in tracks.values())]
    failed: list[Block] = ["No end:", dict(failures)] if failures else []
    sections = [
        Section(title="Every run", blocks=[*([runs] if runs.rows else []), *failed]),
        *(_track(name, points) for name, points in tracks.items()),
        Section(title="How to read it", blocks=[_about_tracks(tracked)]),
        how([r for r in records if r["kind"] == "training"], asked),
        _missing_of_training(tracked, records),
    ]
    return write_page(path, "How sharp on the way?", sections, records)


# -- parts -----------------------------------------------------------------------------


def _checkpoint(found: Any) -> Section:
    """All numbers of one checkpoint, and what to know before believing them."""
    record, summary = found.record, found.summary
    head = [*_head(record), *(["Be careful:"] if summary.notes else [])]
    caption = "Every number"
    picture = _picture(summary, caption, readings_table(summary.readings(), caption))
    lines = str(found.checkup).splitlines() if found.checkup else []
    checkup: list[Block] = ["Checked before:", lines] if lines else []
    crossed = [facts_table(each, "A second opinion") for each in record["cross_check"]]
    audited = record.get("audit")
    audit = (
        [facts_table(audited, "Largest change under the audit's maps")] if audited else []
    )
    notes = [list(summary.notes)] if summary.notes else []
    blocks: list[Block] = [*head, *notes, *checkup, picture, *crossed, *audit]
    return Section(title=record["checkpoint"]["path"], blocks=blocks)


def _head(record: Record) -> list[str]:
    own = record["checkpoint"].get("notes", [])
    return [tables.headline(record), tables.loss_line(record), *own]


def _of_record(record: Record) -> list[Block]:
    caption = record["checkpoint"]["path"]
    notes = [list(record["notes"])] if record["notes"] else []
    return [*_head(record), *notes, readings_table(readings_of(record), caption)]


def _measure(name: str, found: Sequence[Any]) -> Section:
    """A measure's definition and caveat, and its results at every checkpoint."""
    about = MEASURES[name]
    known = {
        "What it is": _sentence(about.definition),
        "What it does not say": about.caveat,
        "In Python": f"sharpness.{about.function}(risk)",
    }
    blocks: list[Block] = [known]
    for each in found:
        if results := each.summary.results.get(name):
            where = "" if len(found) == 1 else each.record["checkpoint"]["path"]
            one = results[0] if len(results) == 1 else Results(results)
            blocks += _result(one, " · ".join(filter(None, (name, where))))
    return Section(title=name, blocks=blocks)


def _result(found: Any, name: str = "Its numbers") -> list[Block]:
    """Pictures and tables of a result, or of several for several radii.

    One that has no picture of its own, but a bar for each number, is a table here: the
    picture of all numbers has its bars.
    """
    table = readings_table(found.readings(), name)
    statuses = {r.status for r in (found if isinstance(found, list) else [found])}
    advice = [f"{s}: {s.advice}" for s in statuses if not s.ok]
    several = isinstance(found, list)
    own = several or found.has_picture
    if not own or not any(r.value == r.value for r in found.readings()):
        return [*advice, table]
    columns, rows = ((), []) if several else found.drawn()
    if not rows:
        return [*advice, _picture(found, name, table)]
    points = Table(caption="What is drawn, point by point", columns=columns, rows=rows)
    return [*advice, _picture(found, name, points), table]


def _picture(found: Any, name: str, table: Table) -> Picture:
    readings = [str(reading) for reading in found.readings()]
    return Picture(figure=found.plot(), alt=_named(name, readings), table=table)


def _named(name: str, parts: Sequence[str]) -> str:
    """The words for a picture: what it shows, and its numbers, the first of them."""
    more = f", and {len(parts) - _MOST_NAMED} more" if len(parts) > _MOST_NAMED else ""
    return f"{name}: {', '.join(parts[:_MOST_NAMED])}{more}. The table below has them all."


def _compared(row: ReadingComparison) -> list[Any]:
    """Cells that are sorted by their numbers, where they are numbers."""
    cells: list[Any] = list(tables.comparison_cells(row))
    values = {1: row.first[0], 2: row.second[0], 3: row.ratio, 4: row.effect_size}
    values |= {6: row.p_value, 7: row.sign_flip_p if row.num_pairs > 1 else float("nan")}
    for i, value in values.items():
        cells[i] = (cells[i], value)
    return cells


def _repeated(path: str | Path, records: Sequence[Record]) -> str:
    """The command, with the functions that a page names and does not run."""
    source = records[0]["checkpoint"].get("source", {}) if records else {}
    code = [f"--{k} {shlex.quote(v)}" for k, v in source.items() if _is_code(v)]
    return " ".join([f"python -m sharpness.measure --from {path}", *code])


def how(records: Sequence[Record], command: str) -> Section:
    """Settings and environment, so that somebody else can repeat it."""
    first = records[0] if records else {}
    keys = ("checkpoint", "subject", "networks", "data", "training", "budget", "regime")
    last = ("settings", "device", "threads", "environment")
    facts = {key: first[key] for key in (*keys, *last) if first.get(key)}
    again = f"To repeat it, with the same settings: {command}"
    same = ["The settings of the first:"] if len(records) > 1 else []
    told = [facts_table(facts, "Settings, data and environment")] if facts else []
    return Section(title="How it was measured", blocks=[again, *same, *told])


def _has(name: str, points: Sequence[TrackedPoint]) -> bool:
    return any(name in point.values() for point in points)


def _track(path: str, points: Sequence[TrackedPoint]) -> Section:
    """A run's picture, and every point of it with its evidence and cost."""
    from sharpness.report.figures import tracking_plot

    columns, rows = tracked_rows(points)
    names = [name for name in TRACKED if _has(name, points)]
    cells = [
        [cell if value is None else (cell, value) for cell, value in pairs]
        for pairs in map(zip_longest, rows, (_numbers_of(p, names) for p in points))
    ]
    caption = f"{path}, point by point"
    table = Table(caption=caption, columns=columns, rows=cells)
    shown = [f"from {rows[0][0]} to {rows[-1][0]} updates", *names]
    picture = Picture(
        figure=tracking_plot(points, names), alt=_named(path, shown), table=table
    )
    bad = {point.status for point in points if not point.status.ok}
    return Section(title=path, blocks=[*(f"{s}: {s.advice}" for s in bad), picture])


def _numbers_of(point: TrackedPoint, names: Sequence[str]) -> list[float | None]:
    """What the cells of a row are sorted by; None for words."""
    values, cost = point.values(), point.cost
    found = [values[n].value if n in values else float("nan") for n in names]
    spent = [cost.products, cost.gradients, cost.seconds]
    return [point.step, point.loss, *found, None, *spent]


def _about_tracks(tracked: Sequence[str]) -> dict[str, str]:
    """Of each measure what it is and does not say, and of the lines beside them."""
    told = {
        name: f"{_sentence(MEASURES[name].definition)} {MEASURES[name].caveat}"
        for name in tracked
    }
    return _OF_TRACKS | told if tracked else {"Nothing was tracked": _UNTRACKED}


def _missing_of_training(tracked: Sequence[str], records: Sequence[Record]) -> Section:
    left = {n: _sentence(MEASURES[n].definition) for n in TRACKED if n not in tracked}
    blocks: list[Block] = [[*(_BETWEEN if tracked else []), *_ALWAYS[1:]]]
    if left:
        blocks += ["Not tracked, and to be had by --track NAME:", left]
    more = (
        "Every other measure, and all of them at the end of training: python -m "
        "sharpness.measure gives them of each checkpoint."
    )
    return Section(title="What was not measured", blocks=[*blocks, more])


def _missing(measured: Sequence[str], records: Sequence[Record]) -> Section:
    """The measures that were left out or not defined, and what no measure tells."""
    unavailable = {
        name: result["note"]
        for record in records
        for name, results in record["measures"].items()
        for result in results
        if result["status"] == Status.NOT_AVAILABLE
    }
    left = [name for names in FAMILIES.values() for name in names if name not in measured]
    blocks: list[Block] = [_ALWAYS]
    if unavailable:
        blocks += ["Asked for, and not defined here:", unavailable]
    if left:
        definitions = {name: _sentence(MEASURES[name].definition) for name in left}
        blocks += ["Not asked for, and to be had by --measures NAME:", definitions]
    return Section(title="What was not measured", blocks=blocks)


def _sentence(text: str) -> str:
    first = text if "_" in text.partition(" ")[0] else f"{text[:1].upper()}{text[1:]}"
    return f"{first.rstrip('.')}."


# -- a page as a question --------------------------------------------------------------


def measured_with(path: str | Path, records: Sequence[Record]) -> dict[str, Any]:
    """The options of `measure` that repeat the records of a page.

    A page is somebody's file, so it names no code to run: networks, data and losses that
    are functions have to be named again.

    Raises:
        ValueError: they are no measurements.
    """
    kinds = {str(record.get("kind")) for record in records}
    got = f"records of {', '.join(sorted(kinds)) or 'nothing'}"
    sound = kinds == {"measurement"} and all("source" in r["checkpoint"] for r in records)
    ensure(sound, "--from", "be the page of a measurement", f"{path} with {got}")
    first = records[0]
    settings = dict(first["settings"])
    settings |= settings.pop("of_measures")
    settings.pop("risk")
    source = {k: v for k, v in first["checkpoint"]["source"].items() if not _is_code(v)}
    return {
        **{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()},
        **source,
        "checkpoint": [record["checkpoint"]["path"] for record in records],
        "audit": "audit" in first,
        "cross_check": bool(first["cross_check"]),
    }


def _is_code(name: str | None) -> bool:
    """Whether a flag's value names a function: `package.module:factory`, `file.py:...`."""
    known = ("timm:", "transformers:")
    return name is not None and ":" in name and not name.startswith(known)
