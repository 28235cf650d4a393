"""Findings in the terminal: what a paper claims, what was found, whether they agree."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from sharpness.report import tables
from sharpness.reproduce.claims import Check, Finding


def print_finding(console: Console, finding: Finding) -> None:
    """One item with its checks and its verdict."""
    console.print(f"\n[bold]{finding.title}[/bold] · {finding.study}", markup=True)
    console.print(f"Claim: {finding.claim}")
    if finding.checks:
        columns = ("paper", "ours", "n", "p", "verdict")
        table = tables.plain_table("", "", *columns, right=1)
        for check in finding.checks:
            table.add_row(*map(Text, cells(check)))
        for column in table.columns[1:3]:
            column.justify = "left"
        console.print(table)
    for note in finding.notes:
        console.print(note)
    console.print(f"Verdict: {finding.verdict_text}", style="bold")


def cells(check: Check) -> list[str]:
    """Claim, paper, ours, n, p, verdict."""
    verdict = "" if check.verdict is None else str(check.verdict)
    return [
        check.claim,
        check.paper or "–",
        check.ours,
        str(check.n),
        p_text(check),
        verdict or "beyond the paper",
    ]


def p_text(check: Check) -> str:
    """`0.0004 / 0.016`: paired t or Kendall, and sign flips."""
    if check.p is None:
        return "–"
    flips = "" if check.flip_p is None else f" / {tables.p_value(check.flip_p)}"
    return tables.p_value(check.p) + flips


def print_verdicts(console: Console, findings: Sequence[Finding]) -> None:
    """Every item's verdict in a line."""
    table = tables.plain_table("", "item", "on", "verdict", right=2)
    for finding in findings:
        table.add_row(*map(Text, (finding.title, finding.study, finding.verdict_text)))
    console.print()
    console.print(table)
