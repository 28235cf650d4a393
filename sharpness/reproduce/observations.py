"""Observations: each says which networks it needs, what it costs and what it finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal

import torch

from sharpness import _tensors, checkpoint
from sharpness.krylov.lanczos import Lanczos
from sharpness.lab import networks
from sharpness.lab.following import Following
from sharpness.lab.run import DivergedError, train
from sharpness.lab.training import StoppingCriteria, Training
from sharpness.loading import LoadedCheckpoint, load_checkpoint
from sharpness.measurement import data_facts, risk_of
from sharpness.measures.eigenvalues import eigenpairs
from sharpness.measures.epsilon import epsilon_sharpness
from sharpness.measures.landscape import interpolation
from sharpness.measures.perturbation import worst_case_sharpness
from sharpness.measures.reparametrise import scaled_by
from sharpness.measures.settings import MeasurementSettings, MeasureSettings
from sharpness.reproduce.model_spec import Bench, ModelSpec
from sharpness.reproduce.serialisation import kind
from sharpness.risk.empirical import EmpiricalRisk
from sharpness.tracking import TrackedPoint

EPSILONS = (1e-3, 5e-4)  # Keskar et al. (2017)
Facts = dict[str, Any]


_phi = partial(epsilon_sharpness, epsilon=EPSILONS, progress=False)
_subspace = partial(_phi, subspace_dim=100, columns="normal", solver="lbfgsb")
NUM_DRAWS = 5  # of the random subspace, where it is drawn again


def _redrawn(risk: EmpiricalRisk, *, seed: int) -> list[Any]:
    """Phi in several subspaces: the protocol's search, and the best of three starts each.

    No subspace is drawn twice over the starting points.
    """
    draws = range(NUM_DRAWS * seed, NUM_DRAWS * (seed + 1))
    return [_subspace(risk, solver=None, num_starts=3, seed=draw) for draw in draws]


def _lanczos(risk: EmpiricalRisk, *, seed: int) -> Facts:
    """T of 40 steps from a start s ~ N(0, I).

    With |s|^2 it decides, without the network, which eigenvalues it certifies.
    """
    generator = _tensors.seeded(seed)
    start = torch.randn(risk.n, generator=generator, dtype=torch.float64)
    run = Lanczos(start.to(risk.theta), generator, num_first=40)
    for _ in range(40):
        run.absorb(risk.product(run.direction(), "hessian"))
    return {
        "alphas": run.state.first.alphas.tolist(),
        "betas": run.state.first.betas.tolist(),
        "noise": run.state.noise,
        "start_norm_squared": float(start.square().sum()),
    }


# Name: what is called with `seed`, and what it costs, in gradients.
MEASURES: dict[str, tuple[Callable[..., Any], float]] = {
    "lambda_max": (partial(eigenpairs, progress=False), 25),
    "phi": (_phi, 60),
    "phi_normal": (_subspace, 22),
    "phi_unit": (partial(_subspace, columns="unit"), 22),
    "phi_normal_zero": (partial(_subspace, start="zero"), 22),
    "phi_normal_best": (partial(_subspace, solver=None, num_starts=2), 120),
    "phi_normal_redrawn": (_redrawn, NUM_DRAWS * 180),
    "lanczos": (_lanczos, 80),
    "adaptive": (
        partial(worst_case_sharpness, rho=0.5, adaptive="elementwise", progress=False),
        21,
    ),
}


@dataclass(frozen=True, kw_only=True)
class _OfOneNetwork:
    """What observes a single network."""

    of: ModelSpec

    @property
    def needs(self) -> tuple[ModelSpec, ...]:
        """The network."""
        return (self.of,)


@kind("Accuracy")
@dataclass(frozen=True, kw_only=True)
class Accuracy(_OfOneNetwork):
    """Loss and accuracy on the training and the test set, as training ended."""

    gradients: ClassVar[float] = 0.0

    def found(self, bench: Bench) -> Facts:
        """What its checkpoint says."""
        about = checkpoint.load(bench.path(self.of)).training
        names = ("metrics", "history", "updates", "seconds", "num_threads")
        return {name: about[name] for name in names}


@kind("Measured")
@dataclass(frozen=True, kw_only=True)
class Measured(_OfOneNetwork):
    """Sharpness of a network, on class-balanced training samples drawn by the seed."""

    measures: tuple[str, ...]  # of MEASURES
    num_samples: int | None = 1000
    batchnorm: Literal["batch", "running"] = "batch"
    seed: int = 0

    @property
    def gradients(self) -> float:
        """Expected cost, in gradients of one sample."""
        return sum(MEASURES[name][1] for name in self.measures) * (self.num_samples or 1e4)

    def found(self, bench: Bench) -> Facts:
        """Every measure with its evidence."""
        subject = load_checkpoint(bench.path(self.of), data_dir=bench.data_dir)
        settings = MeasurementSettings(
            num_samples=_at_most(subject, "train", self.num_samples),
            batchnorm=self.batchnorm,
            of_measures=MeasureSettings(seed=self.seed),
        )
        risk = risk_of(subject, settings, bench.device)
        start = subject.start
        moved = None if start is None else float((risk.theta.cpu() - start).double().norm())
        return {
            "sha256": subject.facts["sha256"],  # of the file, with its times
            "theta": networks.digest(subject.model),
            "data": data_facts(subject, settings),
            "risk": risk.settings(),
            "value": risk.value(),
            "accuracy": risk.accuracy(),
            "distance_from_start": moved,
            **{name: MEASURES[name][0](risk, seed=self.seed) for name in self.measures},
        }


@kind("Joining")
@dataclass(frozen=True, kw_only=True)
class InterpolationRun:
    """Loss and accuracy along the line, or the arc, through two networks."""

    first: ModelSpec
    second: ModelSpec
    split: Literal["train", "test"] = "train"
    arc: bool = False
    num_samples: int | None = 1000

    @property
    def needs(self) -> tuple[ModelSpec, ...]:
        """Both ends."""
        return self.first, self.second

    @property
    def gradients(self) -> float:
        """Expected cost, in gradients of one sample."""
        return 20.0 * (self.num_samples or 1e4)

    def found(self, bench: Bench) -> Facts:
        """25 points from -1 to 2, as in the paper; BatchNorm on batch statistics."""
        ends = [
            load_checkpoint(bench.path(end), data_dir=bench.data_dir) for end in self.needs
        ]
        settings = MeasurementSettings(
            num_samples=_at_most(ends[0], self.split, self.num_samples),
            split=self.split,
            batchnorm="batch",
        )
        first, second = (risk_of(end, settings, bench.device) for end in ends)
        curve = interpolation(first, second.theta, arc=self.arc)
        return {"curve": curve, "sha256": [end.facts["sha256"] for end in ends]}


def _at_most(subject: LoadedCheckpoint, split: str, num: int | None) -> int | None:
    """So many samples, or as many as the split has."""
    if num is None or num >= len(subject.targets(split)):
        return None
    return min(num, subject.usual_number(split) or num)


@kind("Rescaled")
@dataclass(frozen=True, kw_only=True)
class Rescaled(_OfOneNetwork):
    """A network's sharpness after every layer that can be was scaled by each factor.

    The function stays: what one layer gains, the next one loses (Dinh et al. 2017).
    """

    factors: tuple[float, ...]
    measures: tuple[str, ...]
    num_samples: int = 500

    @property
    def gradients(self) -> float:
        """Expected cost, in gradients of one sample."""
        each = sum(MEASURES[name][1] for name in self.measures)
        return each * len(self.factors) * self.num_samples

    def found(self, bench: Bench) -> Facts:
        """For each factor the drift of the outputs, and every measure."""
        subject = load_checkpoint(bench.path(self.of), data_dir=bench.data_dir)
        settings = MeasurementSettings(
            num_samples=_at_most(subject, "train", self.num_samples), batchnorm="running"
        )
        risk = risk_of(subject, settings, bench.device)
        before = risk.outputs()
        points = []
        for factor in self.factors:
            network, layers = scaled_by(subject.model, subject.train[0][:2], factor)
            other = risk_of(replace(subject, model=network), settings, bench.device)
            drift = float((other.outputs() - before).abs().max() / before.abs().max())
            values = {name: MEASURES[name][0](other, seed=0) for name in self.measures}
            points.append({"factor": factor, "drift": drift, "layers": layers, **values})
        return {"sha256": subject.facts["sha256"], "points": points}


@kind("Followed")
@dataclass(frozen=True, kw_only=True)
class TrackingRun:
    """A measure along a training, beside the optimizer's stability threshold."""

    data: str
    training: Training
    budget: StoppingCriteria
    measure: Literal["lambda_max", "lambda_max_preconditioned"] = "lambda_max"
    every: int = 10
    num_samples: int = 1000
    needs: ClassVar[tuple[ModelSpec, ...]] = ()

    @property
    def gradients(self) -> float:
        """Expected cost, in gradients of one sample."""
        updates = self.budget.updates or 1000
        return updates * (self.training.batch_size + 40 / self.every * self.num_samples)

    def found(self, bench: Bench) -> Facts:
        """The points, and how the training ended; nothing else of it is kept."""
        dataset, reason = bench.dataset(self.data), None
        points: list[TrackedPoint] = []
        following = Following(
            measures=(self.measure,), every=self.every, num_samples=self.num_samples
        )
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            try:
                train(
                    self.training,
                    self.budget,
                    dataset,
                    Path(folder) / "tracked.pt",
                    device=bench.device,
                    on_update=following.told(
                        dataset, self.training.batch_size, points.append
                    ),
                )
            except DivergedError as error:
                reason = str(error)
        return {
            "diverged_at": reason,
            "steps": [point.step for point in points],
            "losses": [point.loss for point in points],
            "values": [point.values().get(self.measure) for point in points],
            "thresholds": [point.thresholds.get(self.measure) for point in points],
        }


Observation = Accuracy | Measured | InterpolationRun | Rescaled | TrackingRun
