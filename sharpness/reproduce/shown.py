"""Findings in the terminal and on a page: a claim, the paper's number, ours, a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console

from sharpness.report.tables import p_value, plain_table
from sharpness.reproduce.claims import Check, Finding, Role

COLUMNS = ("quantity and claim", "paper", "ours", "n", "p", "verdict")
VERDICTS = ("item", "on", "p (Holm)", "verdict")


def print_finding(console: Console, finding: Finding) -> None:
    """One item with its checks and its verdict."""
    console.print(f"\n[bold]{finding.title}[/bold] · {finding.study}", markup=True)
    console.print(f"Claim: {finding.claim}")
    for premise in premises(finding):
        console.print(premise)
    if checks := tested(finding):
        table = plain_table(("", *COLUMNS[1:]), map(cells, checks), right=1)
        for column in table.columns[1:3]:
            column.justify = "left"
        console.print(table)
    for note in finding.notes:
        console.print(note)
    console.print(f"Verdict: {finding.verdict_text}", style="bold")


def print_verdicts(console: Console, findings: Sequence[Finding]) -> None:
    """Every item's verdict in a line."""
    console.print("", plain_table(VERDICTS, verdicts(findings), right=3), sep="\n")


def verdicts(findings: Sequence[Finding]) -> list[tuple[str, ...]]:
    """Item, study, p of its primary claims by Holm, verdict: a row each."""
    return [(f.title, f.study, _holm_text(f), f.verdict_text) for f in findings]


def _holm_text(finding: Finding) -> str:
    adjusted = [c.holm for c in finding.of(Role.PRIMARY) if c.holm is not None]
    return ", ".join(map(p_value, adjusted)) or "–"


def premises(finding: Finding) -> list[str]:
    """A sentence for each: what has to hold for the claim to be judged."""
    return [_premise(check) for check in finding.of(Role.PREMISE)]


def _premise(check: Check) -> str:
    beside = f"; paper {check.paper}" if check.paper else ""
    return f"Premise, {check.verdict_text}: {check.claim}: {check.ours}{beside}."


def tested(finding: Finding) -> list[Check]:
    """The checks that are claims."""
    return [check for check in finding.checks if check.role is not Role.PREMISE]


def cells(check: Check) -> list[str]:
    """Claim, paper, ours, n, p, verdict; what is no primary claim says what it is."""
    also = "also: " if check.role is Role.SECONDARY else ""
    claim = f"{also}{check.claim}{'' if check.num_new is None else ' †'}"
    paper, verdict = check.paper or "–", check.verdict_text
    return [claim, paper, check.ours, check.count_text, p_text(check), verdict]


def p_text(check: Check) -> str:
    """`0.0004 / 0.016 / 0.003`: paired t or Page, sign flips, Holm within the paper."""
    known = [check.p, check.flip_p, check.holm]
    if check.p is None:
        return "–"
    if check.flip_p is None and check.holm is not None:
        return f"{p_value(check.p)} / – / {p_value(check.holm)}"
    return " / ".join(p_value(p) for p in known if p is not None)


def finding_text(finding: Finding, picture: str | None) -> str:
    """A section in Markdown: claim, verdict, table, picture, command."""
    verdict = finding.verdict_text
    parts = [
        f"### {finding.title} · {finding.study}, {finding.preset}",
        f"{finding.claim} **{verdict[:1].upper() + verdict[1:]}.**",
    ]
    parts += premises(finding)
    if checks := tested(finding):
        parts.append(markdown(COLUMNS, map(cells, checks)))
    parts += finding.notes
    if picture is not None:
        parts.append(f"![{finding.title}, {finding.study}]({picture})")
    return "\n\n".join([*parts, f"`{finding.command}`"]) + "\n"


def by_study(findings: Sequence[Finding]) -> str:
    """A paper's verdicts: a line for each item, a column for each study."""
    verdicts = {(f.title, f"{f.study}, {f.preset}"): f.verdict_text for f in findings}
    titles, studies = (list(dict.fromkeys(names)) for names in zip(*verdicts, strict=True))
    rows = [(t, *(verdicts.get((t, study), "–") for study in studies)) for t in titles]
    return markdown((findings[0].paper, *studies), rows)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, left-aligned."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines]
    return "\n".join(f"| {line} |" for line in cells)
