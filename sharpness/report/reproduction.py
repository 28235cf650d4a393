"""A reproduced table in the terminal: ours, the paper's, and what it means in words."""

from __future__ import annotations

from rich.console import Console

from sharpness.report import tables
from sharpness.statistics import Row, Section, Verdict


def print_section(console: Console, section: Section, *, title: str) -> None:
    """One section as a table."""
    console.print(f"\n{title}: [bold]{section.title}[/bold]")
    table = tables.plain_table(
        "",
        "",
        "small\nours",
        "large\nours",
        "LB/SB\nours",
        "small\npaper",
        "large\npaper",
        "LB/SB\npaper",
        "LB\nlarger",
        "p",
        "verdict",
        right=1,
    )
    for line in section.rows:
        table.add_row(*_cells(line))
    console.print(table)


def _cells(line: Row) -> list[str]:
    def cell(value: tuple[float, float] | None) -> str:
        return "" if value is None else tables.mean_sd(*value)

    pairs, is_ratio = line.comparison, "acc." not in line.quantity
    return [
        line.quantity,
        cell(line.small),
        cell(line.large),
        f"{pairs.ratio:.3g}" if is_ratio else "",
        cell(line.paper_small),
        cell(line.paper_large),
        f"{line.paper_ratio:.3g}" if is_ratio and line.paper_ratio else "",
        f"{pairs.num_larger} of {pairs.num_pairs}",
        tables.p_value(pairs.p_value),
        _verdict(line),
    ]


def _verdict(line: Row) -> str:
    if line.verdict is None:
        pairs = line.comparison
        return {0: "smaller", pairs.num_pairs: "larger"}.get(pairs.num_larger, "mixed")
    order = {
        Verdict.REPRODUCED: "order yes",
        Verdict.NOT_REPRODUCED: "order no",
        Verdict.INCONCLUSIVE_SOLVER: "order: solvers differ",
        Verdict.INCONCLUSIVE_FEW: "order: too few pairs",
    }[line.verdict]
    if line.size_agrees is None:
        return order
    return f"{order}, size {'yes' if line.size_agrees else 'no'}"


def in_words(section: Section, num_pairs: int) -> list[str]:
    """What the section says, for someone who has not read the paper."""
    by_name = {line.quantity: line for line in section.rows}
    sentences = []
    for name, line in by_name.items():
        if line.verdict is not None:
            sentences.append(f"{name.removesuffix(' %')}: {_phi_sentence(line)}")
    sentences.append(_lambda_sentence(by_name["lambda_max"], num_pairs))
    sentences.append(_accuracy_sentence(by_name["test acc. %"]))
    return sentences


def _phi_sentence(line: Row) -> str:
    pairs = line.comparison
    smallest = f"{pairs.sign_flip_p:.3g} (at best {pairs.sign_flip_smallest:.3g})"
    order = {
        Verdict.REPRODUCED: "the large batch is sharper, as the paper says",
        Verdict.NOT_REPRODUCED: "the paper's order does not hold here",
        Verdict.INCONCLUSIVE_SOLVER: "the order depends on how the maximum is sought",
        Verdict.INCONCLUSIVE_FEW: "too few pairs to tell",
    }[line.verdict or Verdict.INCONCLUSIVE_FEW]
    size = ""
    if line.size_agrees is not None and line.paper_ratio is not None:
        near = "within" if line.size_agrees else "not within"
        size = (
            f"; {pairs.ratio:.3g} times, {near} 10x of the paper's "
            f"{line.paper_ratio:.3g} times"
        )
    return f"{order} (paired t p = {pairs.p_value:.2g}, sign flip p = {smallest}){size}."


def _lambda_sentence(line: Row, num_pairs: int) -> str:
    larger = line.comparison.num_larger
    if larger == num_pairs:
        means = "by curvature, too, the large batch is sharper"
    elif larger == 0:
        means = "by curvature at the minimum itself, the large batch is flatter"
    else:
        means = "curvature at the minimum itself does not tell them apart"
    return (
        f"lambda_max: {means} (larger in {larger} of {num_pairs} pairs, "
        f"ratio {line.comparison.ratio:.3g})."
    )


def _accuracy_sentence(line: Row) -> str:
    gap = line.small[0] - line.large[0]
    pairs = line.comparison
    better = "small" if gap > 0 else "large"
    paper = ""
    if line.paper_small is not None and line.paper_large is not None:
        theirs = line.paper_small[0] - line.paper_large[0]
        paper = f"; in the paper the small batch, by {theirs:.2f}"
    return (
        f"test accuracy: the {better} batch is better by {abs(gap):.2f} points on "
        f"average (large batch better in {pairs.num_larger} of {pairs.num_pairs} "
        f"pairs){paper}."
    )
