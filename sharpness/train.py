"""`python -m sharpness.train F1`: small- and large-batch networks from the same starts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sharpness import _command, _progress
from sharpness.lab import data, networks
from sharpness.lab.training import Budget, Training, default_batch_sizes, train

EPOCHS = {"small": 20, "large": 40}


def _parser() -> _command.Parser:
    parser = _command.Parser(
        prog="python -m sharpness.train",
        description="Train a network with small and large batch from the same starting "
        "points. A finished run is skipped, an interrupted one carried on.",
    )
    add = parser.add_argument
    add("network", choices=sorted(networks.NETWORKS), help="network of the papers")
    add("--data", choices=data.NAMES, default="mnist5k", help="(default: mnist5k)")
    add("--data-dir", help="folder of the data set's files (also $SHARPNESS_DATA)")
    add(
        "--batch-size",
        default="small,large",
        help="with commas; 'small' is 256 (32 below 10 000 training samples), 'large' "
        "10 %% of the training set (default: small,large)",
    )
    add("--seeds", type=int, default=1, help="number of starting points (default: 1)")
    add(
        "--epochs",
        type=int,
        help="(default: 40 from 10 %% of the training set on, else 20)",
    )
    add("--until-loss", type=float, help="stop earlier, at this training loss")
    add("--learning-rate", type=float, default=1e-3, help="of Adam (default: 1e-3)")
    add("--output", help="folder for the checkpoints (default: runs/NETWORK-DATA)")
    add("--device", default="auto", help="'auto', 'cpu', 'cuda', ... (default: auto)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)

    def command() -> int:
        if options.seeds < 1:
            raise ValueError(f"`--seeds` must be at least 1; got {options.seeds}.")
        device = _command.chosen_device(options.device)
        dataset = data.load(options.data, data_dir=options.data_dir)
        folder = Path(options.output or f"runs/{options.network.lower()}-{options.data}")
        sizes = _batch_sizes(options.batch_size, len(dataset.train[0]))
        large = default_batch_sizes(len(dataset.train[0]))[1]
        for seed in range(options.seeds):
            for label, size in sizes.items():
                training = Training(
                    network=options.network,
                    batch_size=size,
                    seed=seed,
                    learning_rate=options.learning_rate,
                )
                default = EPOCHS["large" if size >= large else "small"]
                budget = Budget(
                    epochs=default if options.epochs is None else options.epochs,
                    until_loss=options.until_loss,
                )
                path = folder / f"{label}-seed{seed}.pt"
                _train(training, budget, dataset, path, device)
        return _command.OK

    return _command.guarded("sharpness.train", command)


def _batch_sizes(text: str, num_train: int) -> dict[str, int]:
    """Label of each run and its batch size: {"small": 32, "batch512": 512}."""
    small, large = default_batch_sizes(num_train)
    named = {"small": small, "large": large}
    sizes = {}
    for part in text.split(","):
        if part in named:
            sizes[part] = named[part]
        elif part.isdigit() and 2 <= int(part) <= num_train:
            sizes[f"batch{part}"] = int(part)
        else:
            raise ValueError(
                "`--batch-size` must be 'small', 'large' or a whole number from 2 to "
                f"{num_train} (the training set); got {part!r}."
            )
    return sizes


def _train(
    training: Training, budget: Budget, dataset: data.Dataset, path: Path, device: str
) -> None:
    name = f"{training.network} batch {training.batch_size} seed {training.seed}"
    with _progress.bar(name, budget.epochs, None, unit="epoch") as bar:

        def on_epoch(epoch: int, loss: float) -> None:
            bar.update(epoch - bar.n)
            bar.set_postfix(loss=f"{loss:.4f}")

        trained = train(training, budget, dataset, path, device=device, on_epoch=on_epoch)
    facts = trained.training
    print(
        f"{path}: {facts['epoch']} epochs, training loss "
        f"{facts['metrics']['train_loss_batch']:.2g}, test accuracy "
        f"{facts['metrics']['test_accuracy_batch']:.2%}, {facts['seconds']:.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
