"""The classes of results and errors; reading a saved result, and a record's readings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sharpness._results import (
    Cost,
    DerivativeDisagreesError,
    NondeterministicRiskError,
    NotAvailableError,
    NotConvergedError,
    Reading,
    Result,
    Results,
    Status,
)
from sharpness._saving import load, restored
from sharpness.batchsize.race import Branches, Race
from sharpness.batchsize.result import BatchSizeAdvice
from sharpness.batchsize.updates import UpdateTimes
from sharpness.measures.audit import Audit
from sharpness.measures.batch_sharpness import BatchSharpness
from sharpness.measures.eigenvalues import HessianEigenpairs
from sharpness.measures.epsilon import EpsilonSharpness, SubspaceSharpness
from sharpness.measures.flatness import AccuracyRadius, Norms, RelativeFlatness
from sharpness.measures.gradient_noise import GradientNoise
from sharpness.measures.landscape import Interpolation, LowLossPath
from sharpness.measures.layers import BlockEigenpairs, LayerwiseEigenpairs
from sharpness.measures.models import ModelComparison
from sharpness.measures.perturbation import AverageCaseSharpness, WorstCaseSharpness
from sharpness.measures.planes import LossPlane
from sharpness.measures.sampling import LambdaMaxSampling
from sharpness.measures.spectrum import SpectralDensity, SpectralIntegral
from sharpness.measures.summary import Summary
from sharpness.measures.traces import DiagonalEstimate, StochasticEstimate
from sharpness.risk.doctor import Checkup
from sharpness.tracking import TrackedPoint

__all__ = [
    "AccuracyRadius",
    "Audit",
    "AverageCaseSharpness",
    "BatchSharpness",
    "BatchSizeAdvice",
    "BlockEigenpairs",
    "Branches",
    "Checkup",
    "Cost",
    "DerivativeDisagreesError",
    "DiagonalEstimate",
    "EpsilonSharpness",
    "GradientNoise",
    "HessianEigenpairs",
    "Interpolation",
    "LambdaMaxSampling",
    "LayerwiseEigenpairs",
    "LossPlane",
    "LowLossPath",
    "ModelComparison",
    "NondeterministicRiskError",
    "Norms",
    "NotAvailableError",
    "NotConvergedError",
    "Race",
    "Reading",
    "RelativeFlatness",
    "Result",
    "Results",
    "SpectralDensity",
    "SpectralIntegral",
    "Status",
    "StochasticEstimate",
    "SubspaceSharpness",
    "Summary",
    "TrackedPoint",
    "UpdateTimes",
    "WorstCaseSharpness",
    "load_result",
]


def load_result(path: str | Path) -> Any:
    """A result that its `save` has kept, with every array, on the CPU.

    Nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or damaged.
    """
    return load(path, Result)


def readings_of(record: Mapping[str, Any]) -> list[Reading]:
    """The numbers in a measurement's record, in order."""
    found = restored(dict[str, list[Result]], record["measures"])
    results = (result for several in found.values() for result in several)
    return [reading for result in results for reading in result.readings()]
