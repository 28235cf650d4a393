"""The public names; `__init__.py` loads each when it is asked for."""

from ._results import NondeterministicRiskError as NondeterministicRiskError
from ._results import NotAvailableError as NotAvailableError
from ._results import NotConvergedError as NotConvergedError
from .batchsize.advice import batch_size_advice as batch_size_advice
from .measures.audit import audit as audit
from .measures.batch_sharpness import batch_sharpness as batch_sharpness
from .measures.eigenvalues import eigenpairs as eigenpairs
from .measures.epsilon import epsilon_sharpness as epsilon_sharpness
from .measures.epsilon import subspace_sharpness as subspace_sharpness
from .measures.flatness import norms as norms
from .measures.gradient_noise import gradient_noise as gradient_noise
from .measures.landscape import interpolation as interpolation
from .measures.landscape import low_loss_path as low_loss_path
from .measures.layers import layerwise_eigenpairs as layerwise_eigenpairs
from .measures.models import compare_models as compare_models
from .measures.models import measure_model as measure_model
from .measures.perturbation import average_case_sharpness as average_case_sharpness
from .measures.perturbation import worst_case_sharpness as worst_case_sharpness
from .measures.planes import loss_plane as loss_plane
from .measures.sampling import lambda_max_sampling as lambda_max_sampling
from .measures.spectrum import spectral_density as spectral_density
from .measures.summary import summary as summary
from .measures.traces import trace as trace
from .record import read_records as read_records
from .results import load_result as load_result
from .risk.doctor import doctor as doctor
from .risk.empirical import EmpiricalRisk as EmpiricalRisk
from .tracking import SharpnessTracker as SharpnessTracker

__version__: str
