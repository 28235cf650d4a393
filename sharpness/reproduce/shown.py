"""Findings in the terminal and on a page: a claim, the paper's number, ours, a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sharpness.report import tables
from sharpness.reproduce.claims import Check, Finding


def plain(columns: Sequence[str], rows: Iterable[Sequence[str]], right: int) -> Table:
    """A table for the terminal, whose last `right` columns are text."""
    table = tables.plain_table("", *columns, right=right)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def print_finding(console: Console, finding: Finding) -> None:
    """One item with its checks and its verdict."""
    console.print(f"\n[bold]{finding.title}[/bold] · {finding.study}", markup=True)
    console.print(f"Claim: {finding.claim}")
    if finding.checks:
        columns = ("", "paper", "ours", "n", "p", "verdict")
        table = plain(columns, map(cells, finding.checks), right=1)
        for column in table.columns[1:3]:
            column.justify = "left"
        console.print(table)
    for note in finding.notes:
        console.print(note)
    console.print(f"Verdict: {finding.verdict_text}", style="bold")


def print_verdicts(console: Console, findings: Sequence[Finding]) -> None:
    """Every item's verdict in a line."""
    rows = [(f.title, f.study, f.verdict_text) for f in findings]
    console.print("", plain(("item", "on", "verdict"), rows, right=2), sep="\n")


def cells(check: Check) -> list[str]:
    """Claim, paper, ours, n, p, verdict."""
    verdict = "beyond the paper" if check.verdict is None else str(check.verdict)
    paper, n = check.paper or "–", str(check.n)
    return [check.claim, paper, check.ours, n, p_text(check), verdict]


def p_text(check: Check) -> str:
    """`0.0004 / 0.016`: paired t or Page, and sign flips."""
    known = [tables.p_value(p) for p in (check.p, check.flip_p) if p is not None]
    return " / ".join(known) if check.p is not None else "–"


def finding_text(finding: Finding, picture: str | None) -> str:
    """A section in Markdown: claim, verdict, table, picture, command."""
    verdict = finding.verdict_text
    parts = [
        f"### {finding.title} · {finding.study}, {finding.preset}",
        f"{finding.claim} **{verdict[:1].upper() + verdict[1:]}.**",
    ]
    if finding.checks:
        columns = ("quantity and claim", "paper", "ours", "n", "p", "verdict")
        parts.append(markdown(columns, map(cells, finding.checks)))
    parts += finding.notes
    if picture is not None:
        parts.append(f"![{finding.title}, {finding.study}]({picture})")
    return "\n\n".join([*parts, f"`{finding.command}`"]) + "\n"


def summary(findings: Sequence[Finding]) -> str:
    """A line for each item: on what, which verdict."""
    rows = [(f.paper, f.title, f"{f.study}, {f.preset}", f.verdict_text) for f in findings]
    return markdown(("paper", "item", "on", "verdict"), rows)


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
