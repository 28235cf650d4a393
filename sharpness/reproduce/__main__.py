"""`python -m sharpness.reproduce keskar2017 --quick`: a paper's tables beside ours."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sharpness import _command
from sharpness.lab import data, networks
from sharpness.report import tables
from sharpness.report.reproduction import in_words, print_section
from sharpness.reproduce.keskar2017 import Plan, Reproduction, reproduce
from sharpness.statistics import mean_and_sd


def _parser() -> _command.Parser:
    parser = _command.Parser(
        prog="python -m sharpness.reproduce",
        description="Train small- and large-batch networks from the same starting "
        "points, measure both, and print the paper's tables with ours beside them. "
        "What is already there is not done again: an interrupted run carries on.",
    )
    add = parser.add_argument
    add("paper", choices=("keskar2017",), help="Keskar et al. (2017)")
    add("--preset", choices=("quick",), default="quick", help="size of the job")
    add(
        "--quick",
        action="store_const",
        const="quick",
        dest="preset",
        help="short for --preset quick: 3 starting points, 20 and 40 epochs, 1000 samples",
    )
    add("--network", choices=sorted(networks.NETWORKS), default="F1")
    add("--data", default="mnist5k", help="(default: mnist5k)")
    add("--data-dir", help="folder of the data set's files (also $SHARPNESS_DATA)")
    add(
        "--num-samples",
        type=_command.samples_or_all,
        default=1000,
        help="class-balanced training samples measured, or 'all' (default: 1000)",
    )
    add("--seeds", type=int, default=3, help="starting points (default: 3)")
    add("--epochs", type=_epochs, default=(20, 40), help="small,large (default: 20,40)")
    add("--output", help="run folder (default: runs/keskar2017-NETWORK-DATA)")
    add("--device", default="auto", help="'auto', 'cpu', 'cuda', ... (default: auto)")
    return parser


def _epochs(text: str) -> tuple[int, int]:
    small, large = (int(part) for part in text.split(","))
    return small, large


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)

    def command() -> int:
        name = f"{options.paper}-{options.network}-{options.data}".lower()
        plan = Plan(
            output=Path(options.output or f"runs/{name}"),
            data=options.data,
            data_dir=options.data_dir,
            network=options.network,
            num_seeds=options.seeds,
            epochs_small=options.epochs[0],
            epochs_large=options.epochs[1],
            num_samples=options.num_samples,
            device=_command.chosen_device(options.device),
        )
        dataset = data.load(plan.data, data_dir=plan.data_dir)
        _announce(plan, len(dataset.train[0]))
        _print(reproduce(plan))
        return _command.OK

    return _command.guarded("sharpness.reproduce", command)


def _announce(plan: Plan, num_train: int) -> None:
    measured = "all" if plan.num_samples is None else plan.num_samples
    minutes = "under 4 minutes" if plan.data == "mnist5k" else "longer than mnist5k"
    tables.console().print(
        f"{plan.network} on {plan.data}, {num_train} training images: {plan.num_seeds} "
        f"starting points, each trained with small and large batch and measured on "
        f"{measured} of them. With the defaults {minutes} on two cores."
    )


def _print(found: Reproduction) -> None:
    out, plan = tables.console(), found.plan
    small, large = found.batch_sizes
    for section in found.sections:
        print_section(out, section, title=f"Tables 2 and 3, {plan.network}")
    losses = {role: mean_and_sd(v)[0] for role, v in found.final_losses.items()}
    out.print(
        f"Small batch {small}, {plan.epochs_small} epochs, training loss "
        f"{losses['small']:.2g}; large batch {large}, {plan.epochs_large} epochs, loss "
        f"{losses['large']:.2g}; told to stop at the small batch's loss: "
        f"{losses['matched']:.2g}. Mean ± standard deviation over starting points "
        f"(ours {plan.num_seeds}, paper {found.num_trials_paper}); LB/SB: large over "
        "small batch; p: one-sided paired t test of the logarithms. phi after 10 "
        "iterations of L-BFGS-B, as in the paper; 'best found' also runs sign ascent. "
        "order yes: larger in every pair and p < .05, by both solvers; size yes: ratio "
        "within 10 times of the paper's."
    )
    out.print("\n[bold]In words[/bold] (first table, the paper's setting)")
    for sentence in in_words(found.sections[0], plan.num_seeds):
        out.print(f"  {sentence}")
    out.print(
        f"\nWritten to {plan.output}: records.jsonl, {3 * plan.num_seeds} checkpoints "
        f"(measure one: python -m sharpness.measure {plan.path('large', 0)}), "
        f"{found.figure.name}"
    )


if __name__ == "__main__":
    sys.exit(main())
