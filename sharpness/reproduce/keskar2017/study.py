"""Small- and large-batch networks of one kind, and the sizes of every preset."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from sharpness.reproduce import paper
from sharpness.reproduce.columns import metric
from sharpness.reproduce.model_spec import ModelSpec
from sharpness.reproduce.observations import Measured

BatchRole = Literal["small", "large"]
ROLES: tuple[BatchRole, BatchRole] = ("small", "large")
Pair = tuple[ModelSpec, ModelSpec]  # small batch, large batch


@dataclass(frozen=True, kw_only=True)
class KeskarStudy(paper.Study):
    """Sizes of a network's comparison.

    Args:
        small: batch size.
        large: batch size.
        epochs_small: epochs at which small-batch networks are observed; the last is
            the end.
        epochs_large: of large-batch ones.
        num_followed: of the starting points, observed before the end as well.
        num_samples: training samples that sharpness is measured on.
        swept: batch sizes of figure 4.
        epochs_swept: for each of them.
        num_swept: starting points of figure 4.
        epochs_warm: of the large-batch runs of figure 5.
        num_warm: starting points of figure 5.
        num_remedied: starting points of tables 6 and 7 and of adversarial training.
        batchnorm: whether the network has BatchNorm.
        one_draw: whether all starting points share their samples, random subspace and
            starts of the search; else each has its own.
        redrawn: whether the random subspace of Table 4 is drawn again, several times.
        observed_at_fit: whether networks are observed where their training accuracy first
            reaches the paper's.
        also: measures taken at the end of training beside the usual ones.
    """

    small: int
    large: int
    epochs_small: tuple[float, ...]
    epochs_large: tuple[float, ...]
    num_followed: int = 6
    num_samples: int | None = 1000
    swept: tuple[int, ...] = ()
    epochs_swept: float = 0.0
    num_swept: int = 6
    epochs_warm: float = 0.0
    num_warm: int = 6
    num_remedied: int = 6
    batchnorm: bool = True
    one_draw: bool = False
    redrawn: bool = False
    observed_at_fit: bool = False
    also: tuple[str, ...] = ()

    @property
    def about(self) -> str:
        """How the networks were trained and measured."""
        several = [
            f"figure 4: {self.epochs_swept:g} epochs" if self.swept else "",
            f"figure 5: {self.epochs_warm:g} after each start" if self.epochs_warm else "",
        ]
        return self._about("".join(f"; {one}" for one in several if one))

    @property
    def about_ends(self) -> str:
        """The same of the networks at the end of training alone."""
        return self._about("")

    def _about(self, more: str) -> str:
        samples = self.num_samples or "all"
        how = ", with their batch statistics in BatchNorm" if self.batchnorm else ""
        draws = (
            "These samples, the random subspace and the starts of the search are one draw, "
            "shared by all starting points."
            if self.one_draw
            else "Each starting point has samples, a random subspace and starts of its own."
        )
        return (
            f"Batch {self.small} for {self.epochs_small[-1]:g} epochs, {self.large} for "
            f"{self.epochs_large[-1]:g}{more}; Adam at 1e-3, not tuned. Sharpness on "
            f"{samples} training samples{how}. {draws}"
        )

    def published(self, table: str) -> Any:
        """The paper's numbers for this network; None where its data are others."""
        numbers = paper.paper_numbers("keskar2017").get(table, {})
        return None if self.stand_in else numbers.get(self.network)

    def with_seeds(self, num: int) -> Self:
        """The same with so many starting points, everywhere."""
        names = ("num_followed", "num_swept", "num_warm", "num_remedied")
        fewer = {name: min(num, getattr(self, name)) for name in names}
        return replace(self, num_seeds=num, **fewer)

    def network_at(
        self, batch_size: int, seed: int, epochs: float, **more: Any
    ) -> ModelSpec:
        """A network of this study: Adam at 1e-3, the same for every batch size."""
        return self.trained(epochs, batch_size=batch_size, seed=seed, **more)

    def epochs(self, role: BatchRole) -> tuple[float, ...]:
        """When networks of a role are observed."""
        return self.epochs_small if role == "small" else self.epochs_large

    def at(
        self, role: BatchRole, seed: int, epochs: float | None = None, **more: Any
    ) -> ModelSpec:
        """A network of a role, at its end unless told otherwise."""
        batch_size = self.small if role == "small" else self.large
        return self.network_at(batch_size, seed, epochs or self.epochs(role)[-1], **more)

    def ends(self, num: int | None = None, **more: Any) -> list[Pair]:
        """Small- and large-batch networks, by starting point; the first `num` of them."""
        return [
            (self.at("small", seed, **more), self.at("large", seed, **more))
            for seed in self.seeds[:num]
        ]

    def followed(self, role: BatchRole) -> list[tuple[float, ModelSpec]]:
        """(epoch, network) along training, for each starting point that is followed."""
        return [
            (epochs, self.at(role, seed, epochs))
            for seed in range(self.num_followed)
            for epochs in self.epochs(role)
        ]

    def fitted(self) -> list[Pair]:
        """Both networks as soon as their training accuracy is the paper's."""
        train = self.published("table2")["train"]

        def until(network: ModelSpec, percent: float) -> ModelSpec:
            return replace(
                network,
                budget=replace(network.budget, until_accuracy=round(percent / 100, 6)),
            )

        return [(until(a, train[0][0]), until(b, train[1][0])) for a, b in self.ends()]

    def matched(self) -> list[Pair]:
        """The large batch is stopped at its small-batch twin's training loss."""
        return [
            (small, self.at("large", small.training.seed, until_loss_of=small))
            for small, _ in self.ends()
        ]

    def equal_epochs(self) -> list[Pair]:
        """Figure 4's networks at both batch sizes, trained for as many epochs."""
        if not {self.small, self.large} <= set(self.swept):
            return []
        return [
            (
                self.network_at(self.small, seed, self.epochs_swept),
                self.network_at(self.large, seed, self.epochs_swept),
            )
            for seed in range(self.num_swept)
        ]

    def measured(self, of: ModelSpec, *measures: str, **more: Any) -> Measured:
        """On this study's samples, with draws of each starting point's own or one draw."""
        return Measured(
            of=of,
            measures=measures,
            num_samples=self.num_samples,
            seed=0 if self.one_draw else of.training.seed,
            **more,
        )

    def sharpness(self, of: ModelSpec) -> Measured:
        """What the tables need, by the authors' way to run BatchNorm."""
        usual = ("lambda_max", "phi", "phi_normal", "phi_unit", "adaptive")
        return self.measured(of, *usual, *self.also)

    def phi(self, of: ModelSpec) -> Measured:
        """Phi alone."""
        return self.measured(of, "phi")

    def curvature_and_phi(self, of: ModelSpec, **more: Any) -> Measured:
        """lambda_max and phi."""
        return self.measured(of, "lambda_max", "phi", **more)


def flat(pairs: Iterable[Pair]) -> list[ModelSpec]:
    """Both networks of every pair, in one list."""
    return [network for pair in pairs for network in pair]


TEST_ACCURACY = metric("test_accuracy_batch", 100)  # percent


_TWO_CORES = "for two cores"
STUDIES = (
    KeskarStudy(
        name="F1-mnist",
        preset="quick",
        network="F1",
        data="mnist5k",
        reduced="4000 of MNIST's 60 000 training images, 3 starting points for the paper's "
        "5, so that it takes minutes",
        small=32,
        large=400,
        epochs_small=(1, 4, 20),
        epochs_large=(4, 12, 40),
        num_seeds=3,
        num_followed=1,
        swept=(32, 400, 2000),
        epochs_swept=20,
        num_swept=2,
        epochs_warm=20,
        num_warm=1,
        num_remedied=3,
    ),
    KeskarStudy(
        name="MLP-digits",
        preset="quick",
        network="MLP?width=16&out_features=10",
        data="digits",
        reduced="a tanh network of 1482 parameters: what it says of the paper is little, "
        "but anyone can rerun it in a minute or two",
        stand_in="digits of 8 x 8 pixels for MNIST, and a network without BatchNorm",
        small=16,
        large=143,
        epochs_small=(2, 8, 30),
        epochs_large=(30, 90, 300),
        num_followed=2,
        batchnorm=False,
        one_draw=True,
        seen=3,
    ),
    KeskarStudy(
        name="F1-mnist",
        preset="reduced",
        network="F1",
        data="mnist[5000]",
        reduced=f"5000 of MNIST's 60 000 training images, {_TWO_CORES}; large batch 10 % "
        "as in the paper, small batch 32",
        small=32,
        large=500,
        epochs_small=(1, 2, 4, 8, 14, 20),
        epochs_large=(2, 5, 10, 20, 40, 60),
        swept=(32, 100, 250, 500, 1000, 2500),
        epochs_swept=40,
        epochs_warm=40,
        one_draw=True,
        redrawn=True,
        seen=3,
    ),
    KeskarStudy(
        name="F1-fashion-mnist",
        preset="reduced",
        network="F1",
        data="fashion-mnist[5000]",
        reduced=f"5000 of 60 000 training images, {_TWO_CORES}",
        stand_in="Fashion-MNIST for MNIST, to see whether it carries over",
        small=32,
        large=500,
        epochs_small=(1, 2, 4, 8, 14, 20),
        epochs_large=(2, 5, 10, 20, 40, 60),
        swept=(32, 100, 250, 500, 1000, 2500),
        epochs_swept=40,
        epochs_warm=40,
        one_draw=True,
        seen=3,
    ),
    KeskarStudy(
        name="C1-cifar10",
        preset="reduced",
        network="C1",
        data="cifar10[2000,test=2000]",
        reduced=f"2000 of CIFAR-10's 50 000 training and of its test images, {_TWO_CORES}; "
        "large batch 10 % as in the paper, small batch 16; sharpness on 100 samples",
        small=16,
        large=200,
        epochs_small=(1, 2, 4, 8, 11, 15),
        epochs_large=(2, 5, 10, 20, 30),
        num_samples=100,
        swept=(16, 64, 200, 1000),
        epochs_swept=20,
        epochs_warm=15,
        one_draw=True,
        seen=3,
    ),
    KeskarStudy(
        name="F2-spoken-digits",
        preset="reduced",
        network="F2",
        data="spoken-digits[12000,test=4800]",
        reduced=f"12 000 of 116 967 frames, {_TWO_CORES}",
        stand_in="spoken digits for TIMIT, which is licensed",
        small=64,
        large=1200,
        epochs_small=(2, 8),
        epochs_large=(5, 25),
    ),
    KeskarStudy(
        name="F1-mnist",
        preset="full",
        network="F1",
        data="mnist",
        small=256,
        large=6000,
        epochs_small=(1, 2, 5, 10, 20, 50, 100),
        epochs_large=(1, 2, 5, 10, 20, 50, 100),
        num_samples=10_000,
        swept=(64, 256, 512, 1024, 2048, 5000),
        epochs_swept=100,
        epochs_warm=100,
        observed_at_fit=True,
        also=("phi_normal_zero", "phi_normal_best", "lanczos"),
    ),
    *(
        KeskarStudy(
            name=f"{network}-{data}",
            preset="full",
            network=network,
            data=data,
            stand_in=stand_in,
            small=256,
            large=large,
            epochs_small=(1, 2, 5, 10, 20, 50, 100),
            epochs_large=(1, 2, 5, 10, 20, 50, 100),
            num_seeds=6,
            num_samples=samples,
            swept=(64, 256, 512, 1024, 2048, 5000),
            epochs_swept=100,
            epochs_warm=100,
        )
        for network, data, large, samples, stand_in in (
            ("C1", "cifar10", 5000, 10_000, None),
            ("C2", "cifar10", 5000, 5000, None),
            ("C3", "cifar100", 5000, None, None),
            ("C4", "cifar100", 5000, 5000, None),
            ("F2", "spoken-digits", 11696, None, "spoken digits for TIMIT, licensed"),
        )
    ),
)
