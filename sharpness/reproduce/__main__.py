"""`python -m sharpness.reproduce keskar2017 --quick`: a paper's findings beside ours."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sharpness import _command
from sharpness._arguments import package
from sharpness.reproduce import PAPER_NAMES, PRESETS

if TYPE_CHECKING:
    from sharpness.reproduce.claims import Finding
    from sharpness.reproduce.observations import Observation
    from sharpness.reproduce.paper import InShort, Item, Paper, Study
    from sharpness.reproduce.runner import Runner

_ADVICE = (
    "p: one-sided, by a paired t test over starting points (trends: Page's L), then by "
    "sign flips; below, by Holm over the claims of this run. reproduced, not reproduced: "
    "the 95 % interval lies on the claim's side, or on the other; undecided otherwise, and "
    "below 3 starting points. provisional: fewer than 6, on the t test alone. size: "
    "whether the paper's number lies in the interval. †: changed after numbers had been "
    "seen, so new starting points alone decide. phi: ten iterations of L-BFGS-B, as in the "
    "paper; the best value found must agree."
)


def _parser() -> _command.Parser:
    parser = _command.Parser(
        prog="python -m sharpness.reproduce",
        description="Train what a paper trained, measure it, and print every table and "
        "figure with ours beside theirs and a verdict. What is already there is not done "
        "again: an interrupted run carries on.",
    )
    add = parser.add_argument
    add("paper", nargs="?", choices=sorted(PAPER_NAMES), help="which paper")
    add(
        "--items",
        type=_command.names,
        default=(),
        help="tables or figures, with commas, or 'all' (--list names them; default: the "
        "paper's question in short where it can be had, else all)",
    )
    add("--preset", choices=PRESETS, default="quick", help="size of the job")
    add(
        "--quick",
        action="store_const",
        const="quick",
        dest="preset",
        help="short for --preset quick, the default: minutes on two cores",
    )
    add("--study", action="append", help="network and data, by name (default: all)")
    add("--seeds", type=int, help="starting points (default: the preset's)")
    add("--data-dir", help="folder of the data sets' files (also $SHARPNESS_DATA)")
    add("--output", type=Path, help="run folder (default: runs/reproduce-PRESET)")
    add("--device", default="auto", help="'auto', 'cpu', 'cuda', ... (default: auto)")
    add("--jobs", type=int, help="things done at once (default: one a core)")
    add("--list", action="store_true", help="name items and studies, and do nothing")
    add("--plan", action="store_true", help="say what would be done, and do nothing")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)

    def command() -> int:
        package("pandas")  # of the papers' tables: says what to install
        from sharpness.report import tables
        from sharpness.reproduce.claims import with_holm
        from sharpness.reproduce.papers import PAPERS
        from sharpness.reproduce.runner import Runner
        from sharpness.reproduce.shown import print_verdicts

        if options.paper is None:
            return _list_papers()
        paper = PAPERS[options.paper]
        if options.list:
            return _list(paper)
        if options.jobs is not None and options.jobs < 1:
            raise ValueError(f"`--jobs` must be at least 1; got {options.jobs}.")
        runner = Runner(
            folder=options.output or Path(f"runs/reproduce-{options.preset}"),
            data_dir=options.data_dir,
            device=_command.chosen_device(options.device),
            jobs=options.jobs,
        )
        if paper.in_short and options.preset == "quick" and not options.items:
            study = _studies(paper, options)[0]
            return _in_short(paper.in_short, study, runner, options)
        findings = []
        for study in _studies(paper, options):
            if items := _items(paper, options.items, study):
                findings += _reproduced(paper, items, study, runner, options.plan)
        if findings:
            print_verdicts(tables.console(), with_holm(findings))
            tables.console().print(f"\n{_ADVICE}\nWritten to {runner.folder}.")
        elif not options.plan:
            raise ValueError(
                "`--items` must be part of this preset's studies; got "
                f"{', '.join(options.items)}. See --list."
            )
        return _command.OK

    return _command.guarded("sharpness.reproduce", command)


def _list_papers() -> int:
    from sharpness.report import tables
    from sharpness.reproduce.papers import PAPERS

    for name, paper in PAPERS.items():
        tables.console().print(f"{name}: {paper.citation}")
    return _command.OK


def _in_short(
    question: InShort, study: Study, runner: Runner, options: argparse.Namespace
) -> int:
    """The answer in sentences, one table, one picture, and what to run for more."""
    from sharpness.report import tables
    from sharpness.reproduce.shown import plain

    out, wanted = tables.console(), question.observations(study)
    plan = _plan(study, (), runner, wanted).strip()
    print(plan, file=None if options.plan else sys.stderr)
    if options.plan:
        return _command.OK
    store = runner.carry_out(wanted, said=_piped)
    for sentence in question.sentences(study, store):
        out.print(sentence)
    out.print(f"\n{study.name}: {question.about(study)}")
    out.print(plain(question.columns, question.rows(study, store), right=1))
    path = runner.folder / f"{options.paper}-{study.name}.png"
    out.print(f"Picture: {question.draw(path, study, store)}")
    command = f"python -m sharpness.reproduce {options.paper}"
    out.print(f"Tables and figures with verdicts: {command} --items all (--plan: how long)")
    out.print(f"Six starting points, hours: {command} --preset reduced")
    return _command.OK


def _piped(line: str) -> None:
    """Progress for those who see no bar."""
    if not sys.stderr.isatty():
        print(f"sharpness.reproduce: {line}", file=sys.stderr, flush=True)


def _list(paper: Paper) -> int:
    from sharpness.report import tables
    from sharpness.reproduce.shown import plain

    out = tables.console()
    out.print(paper.citation)
    items = [("", item.name, item.title) for item in paper.items]
    out.print(plain(("", "item", "what"), items, right=1))
    studies = [("", s.name, s.preset, f"{s.network} on {s.data}") for s in paper.studies]
    out.print(plain(("", "study", "preset", "network and data"), studies, right=2))
    return _command.OK


def _studies(paper: Paper, options: argparse.Namespace) -> list[Study]:
    """Those of the preset that were asked for, with as many starting points."""
    of_preset = [study for study in paper.studies if study.preset == options.preset]
    names = [study.name for study in of_preset]
    if not of_preset:
        there = ", ".join(sorted({study.preset for study in paper.studies}))
        raise ValueError(
            f"`--preset` must be one of {there} for {paper.name}; got {options.preset}."
        )
    if unknown := set(options.study or ()) - set(names):
        raise ValueError(
            f"`--study` must be of {', '.join(names)} (preset {options.preset}); got "
            f"{', '.join(sorted(unknown))}."
        )
    chosen = [study for study in of_preset if study.name in (options.study or names)]
    if options.seeds is None:
        return chosen
    if options.seeds < 2:
        raise ValueError(
            f"`--seeds` must be at least 2 for a paired comparison; got {options.seeds}. "
            "6 are enough for a verdict."
        )
    return [study.with_seeds(options.seeds) for study in chosen]


def _items(paper: Paper, names: Sequence[str], study: Study) -> list[Item]:
    asked = [paper.item(name) for name in dict.fromkeys(names) if name != "all"]
    everything = [i for i in paper.items if i.in_quick or study.preset != "quick"]
    return [item for item in asked or everything if item.applies(study)]


def _reproduced(
    paper: Paper, items: Sequence[Item], study: Study, runner: Runner, only_plan: bool
) -> list[Finding]:
    from sharpness.report import tables
    from sharpness.report.panels import draw
    from sharpness.reproduce.paper import finding
    from sharpness.reproduce.runner import ObservationStore
    from sharpness.reproduce.shown import print_finding

    out, findings = tables.console(), []
    wanted = [o for item in items for o in item.observations(study)]
    out.print(_plan(study, items, runner, wanted))
    store = ObservationStore(()) if only_plan else runner.carry_out(wanted, said=_piped)
    for item in () if only_plan else items:
        found = finding(paper, item, study, store)
        print_finding(out, found)
        findings.append(found)
        if panels := item.drawn(study, store):
            name = f"{found.paper}-{item.name}-{study.name}-{study.preset}.png"
            title = f"{item.title} · {study.network} on {study.data}"
            out.print(f"Picture: {draw(runner.folder / name, panels, title=title)}")
    return findings


def _plan(
    study: Study, items: Sequence[Item], runner: Runner, wanted: Sequence[Observation]
) -> str:
    """What is tried on what, what remains to be done, and how long it may take."""
    from sharpness.lab.sweep import side_by_side
    from sharpness.reproduce.runner import Costs

    stages, missing = runner.lacking(wanted)
    num = sum(map(len, stages)) + len(missing)
    jobs, _ = side_by_side(runner.jobs, runner.device, num)
    minutes = Costs(runner.bench).of_all(stages, missing) / jobs / 60
    time = "under a minute" if minutes < 1 else f"about {minutes:.0f} minutes"
    lines = (
        f"\n{study.name}, preset {study.preset}: {study.network} on {study.data}.",
        study.about,
        f"Stand-in: {study.stand_in}." if study.stand_in else "",
        f"Reduced: {study.reduced}." if study.reduced else "",
        f"Items: {', '.join(item.name for item in items)}." if items else "",
        f"To do: {sum(map(len, stages))} training runs, {len(missing)} of "
        f"{len(set(wanted))} observations; "
        f"{time if runner.device == 'cpu' else 'less than on a CPU'}.",
    )
    return "\n".join(filter(None, lines))


if __name__ == "__main__":
    sys.exit(main())
