"""What `python -m sharpness.reproduce` does: plans, observations, findings, pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sharpness import _command
from sharpness._pages import report
from sharpness.lab.cluster import checked, side_by_side
from sharpness.report.figures import written
from sharpness.report.panels import draw
from sharpness.report.tables import console, plain_table
from sharpness.reproduce.claims import with_holm
from sharpness.reproduce.observations import Observation
from sharpness.reproduce.paper import InShort, Item, Paper, Study, finding
from sharpness.reproduce.papers import PAPERS
from sharpness.reproduce.report_page import Found, answer_page, findings_page
from sharpness.reproduce.runner import Costs, ObservationStore, Runner
from sharpness.reproduce.shown import print_finding, print_verdicts

_ADVICE = (
    "p: one-sided, by a paired t test over starting points (trends: Page's L), then by "
    "sign flips; below, by Holm over the claims of this run. reproduced, not reproduced: "
    "the 95 % interval lies on the claim's side, or on the other; undecided otherwise, and "
    "below 3 starting points. provisional: fewer than 6, on the t test alone. size: "
    "whether the paper's number lies in the interval. †: changed after numbers had been "
    "seen, so new starting points alone decide. phi: ten iterations of L-BFGS-B, as in the "
    "paper; the best value found must agree."
)


def reproduce(options: argparse.Namespace) -> int:
    """Carry out a command whose options were read; returns its exit code."""
    if options.paper is None:
        return _list_papers()
    paper = PAPERS[options.paper]
    if options.list:
        return _list(paper)
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"`--jobs` must be at least 1; got {options.jobs}.")
    if options.cluster is not None:
        checked("--cluster", options.cluster)
    _command.check_report(options.report)
    runner = Runner(
        folder=options.output or Path(f"runs/reproduce-{options.preset}"),
        data_dir=options.data_dir,
        device=_command.chosen_device(options.device, options.cluster),
        jobs=options.jobs,
        cluster=options.cluster,
    )
    if paper.in_short and options.preset == "quick" and not options.items:
        study = _studies(paper, options)[0]
        return _in_short(paper, paper.in_short, study, runner, options)
    found: list[Found] = []
    failures: list[str] = []
    code = _command.OK
    for study in _studies(paper, options):
        if items := _items(paper, options.items, study):
            of_study, store = _reproduced(paper, items, study, runner, options.plan)
            found, code = found + of_study, max(code, _failed(store))
            failures += store.failed
    if found:
        findings = with_holm([finding for *_, finding in found])
        print_verdicts(console(), findings)
        console().print(f"\n{_ADVICE}\nWritten to {runner.folder}.")
        held = [(*of, one) for (*of, _), one in zip(found, findings, strict=True)]
        shown = (paper, held, runner.store(), failures, _ADVICE, options.asked)
        report("sharpness.reproduce", options.report, findings_page, *shown)
    elif not options.plan:
        raise ValueError(
            "`--items` must be part of this preset's studies; got "
            f"{', '.join(options.items)}. See --list."
        )
    return code


def _list_papers() -> int:
    for name, paper in PAPERS.items():
        console().print(f"{name}: {paper.citation}")
    return _command.OK


def _in_short(
    paper: Paper,
    question: InShort,
    study: Study,
    runner: Runner,
    options: argparse.Namespace,
) -> int:
    """The answer in sentences, one table, one picture, and what to run for more."""
    out, wanted = console(), question.observations(study)
    plan = _plan(study, (), runner, wanted).strip()
    print(plan, file=None if options.plan else sys.stderr)
    if options.plan:
        return _command.OK
    store = runner.carry_out(wanted, said=_piped)
    for sentence in question.sentences(study, store):
        out.print(sentence)
    out.print(f"\n{study.name}: {question.about(study)}")
    out.print(plain_table(question.columns, question.rows(study, store), right=1))
    path = runner.folder / f"{options.paper}-{study.name}.png"
    written(question.figure(study, store), path, dpi=110)
    out.print(f"Picture: {path}")
    command = f"python -m sharpness.reproduce {options.paper}"
    out.print(f"Tables and figures with verdicts: {command} --items all (--plan: how long)")
    out.print(f"Six starting points, hours: {command} --preset reduced")
    shown = (paper, study, store, options.asked)
    report("sharpness.reproduce", options.report, answer_page, *shown)
    return _failed(store)


def _failed(store: ObservationStore) -> int:
    """Say what could not be done, for which numbers are missing; returns the exit code."""
    for line in store.failed:
        _command.say("sharpness.reproduce", line)
    return _command.NOT_CONVERGED if store.failed else _command.OK


def _piped(line: str) -> None:
    """Progress for those who see no bar."""
    if not sys.stderr.isatty():
        print(f"sharpness.reproduce: {line}", file=sys.stderr, flush=True)


def _list(paper: Paper) -> int:
    out = console()
    out.print(paper.citation)
    items = [("", item.name, item.title) for item in paper.items]
    out.print(plain_table(("", "item", "what"), items, right=1))
    studies = [("", s.name, s.preset, f"{s.network} on {s.data}") for s in paper.studies]
    out.print(plain_table(("", "study", "preset", "network and data"), studies, right=2))
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
) -> tuple[list[Found], ObservationStore]:
    out, findings = console(), []
    wanted = [o for item in items for o in item.observations(study)]
    out.print(_plan(study, items, runner, wanted))
    store = ObservationStore(()) if only_plan else runner.carry_out(wanted, said=_piped)
    for item in () if only_plan else items:
        found = finding(paper, item, study, store)
        print_finding(out, found)
        findings.append((item, study, found))
        if panels := item.drawn(study, store):
            name = f"{found.paper}-{item.name}-{study.name}-{study.preset}.png"
            title = f"{item.title} · {study.network} on {study.data}"
            out.print(f"Picture: {draw(runner.folder / name, panels, title=title)}")
    return findings, store


def _plan(
    study: Study, items: Sequence[Item], runner: Runner, wanted: Sequence[Observation]
) -> str:
    """What is tried on what, what remains to be done, and how long it may take."""
    stages, missing = runner.lacking(wanted)
    jobs, _ = side_by_side(runner.jobs, runner.device, sum(map(len, stages)) + len(missing))
    minutes = Costs(runner.bench).of_all(stages, missing) / 60
    minutes = minutes if runner.cluster else minutes / jobs
    time = "under a minute" if minutes < 1 else f"about {minutes:.0f} minutes"
    time += " of one core" if runner.cluster else ""
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
