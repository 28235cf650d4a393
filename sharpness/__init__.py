"""How sharp is the minimum a network was trained to, and can the number be trusted?"""

from importlib.metadata import version

from sharpness.measures.audit import Audit as Audit
from sharpness.measures.audit import audit as audit
from sharpness.measures.eigenvalues import HessianEigenpairs as HessianEigenpairs
from sharpness.measures.eigenvalues import eigenpairs as eigenpairs
from sharpness.measures.epsilon import EpsilonSharpness as EpsilonSharpness
from sharpness.measures.epsilon import SubspaceSharpness as SubspaceSharpness
from sharpness.measures.epsilon import epsilon_sharpness as epsilon_sharpness
from sharpness.measures.epsilon import subspace_sharpness as subspace_sharpness
from sharpness.measures.flatness import AccuracyRadius as AccuracyRadius
from sharpness.measures.flatness import Norms as Norms
from sharpness.measures.flatness import RelativeFlatness as RelativeFlatness
from sharpness.measures.flatness import box_alpha as box_alpha
from sharpness.measures.flatness import norms as norms
from sharpness.measures.flatness import pac_bayes_sigma as pac_bayes_sigma
from sharpness.measures.flatness import relative_flatness as relative_flatness
from sharpness.measures.landscape import Interpolation as Interpolation
from sharpness.measures.landscape import interpolation as interpolation
from sharpness.measures.layers import BlockEigenpairs as BlockEigenpairs
from sharpness.measures.layers import LayerwiseEigenpairs as LayerwiseEigenpairs
from sharpness.measures.layers import layerwise_eigenpairs as layerwise_eigenpairs
from sharpness.measures.perturbation import AverageCaseSharpness as AverageCaseSharpness
from sharpness.measures.perturbation import NormalisedLogits as NormalisedLogits
from sharpness.measures.perturbation import WorstCaseSharpness as WorstCaseSharpness
from sharpness.measures.perturbation import average_case_sharpness as average_case_sharpness
from sharpness.measures.perturbation import worst_case_sharpness as worst_case_sharpness
from sharpness.measures.preconditioner import adam_preconditioner as adam_preconditioner
from sharpness.measures.sampling import LambdaMaxSampling as LambdaMaxSampling
from sharpness.measures.sampling import lambda_max_sampling as lambda_max_sampling
from sharpness.measures.spectrum import SpectralDensity as SpectralDensity
from sharpness.measures.spectrum import SpectralIntegral as SpectralIntegral
from sharpness.measures.spectrum import spectral_density as spectral_density
from sharpness.measures.summary import Summary as Summary
from sharpness.measures.summary import summary as summary
from sharpness.measures.traces import DiagonalEstimate as DiagonalEstimate
from sharpness.measures.traces import StochasticEstimate as StochasticEstimate
from sharpness.measures.traces import diagonal as diagonal
from sharpness.measures.traces import frobenius_norm as frobenius_norm
from sharpness.measures.traces import trace as trace
from sharpness.record import Records as Records
from sharpness.record import read_records as read_records
from sharpness.results import NondeterministicRiskError as NondeterministicRiskError
from sharpness.results import NotAvailableError as NotAvailableError
from sharpness.results import NotConvergedError as NotConvergedError
from sharpness.results import Status as Status
from sharpness.risk.checks import Checkup as Checkup
from sharpness.risk.checks import doctor as doctor
from sharpness.risk.empirical import EmpiricalRisk as EmpiricalRisk
from sharpness.tracking import SharpnessTracker as SharpnessTracker

__version__ = version("sharpness")
