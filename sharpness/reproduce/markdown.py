"""Findings as Markdown: tables that a page is made of."""

from __future__ import annotations

from collections.abc import Sequence

from sharpness.reproduce.claims import Finding
from sharpness.reproduce.terminal import cells


def finding_text(finding: Finding, picture: str | None) -> str:
    """A section: claim, verdict, table, picture, command."""
    parts = [
        f"### {finding.title} · {finding.study}, {finding.preset}",
        f"{finding.claim} **{_capital(finding.verdict_text)}.**",
    ]
    if finding.checks:
        columns = ("quantity and claim", "paper", "ours", "n", "p", "verdict")
        parts.append(table(columns, [cells(check) for check in finding.checks]))
    parts += finding.notes
    if picture is not None:
        parts.append(f"![{finding.title}, {finding.study}]({picture})")
    parts.append(f"`{finding.command}`")
    return "\n\n".join(parts) + "\n"


def summary(findings: Sequence[Finding]) -> str:
    """A line for each item: on what, which verdict."""
    rows = [(f.paper, f.title, f"{f.study}, {f.preset}", f.verdict_text) for f in findings]
    return table(("paper", "item", "on", "verdict"), rows)


def by_study(findings: Sequence[Finding]) -> str:
    """A paper's verdicts: a line for each item, a column for each study."""
    studies = list(dict.fromkeys(f"{f.study}, {f.preset}" for f in findings))
    verdicts = {(f.title, f"{f.study}, {f.preset}"): f.verdict_text for f in findings}
    rows = [
        (title, *(verdicts.get((title, study), "–") for study in studies))
        for title in dict.fromkeys(f.title for f in findings)
    ]
    return table((findings[0].paper, *studies), rows)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, left-aligned."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
