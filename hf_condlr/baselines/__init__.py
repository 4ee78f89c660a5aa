"""What CondLR is compared with: full-rank layers with orthonormal weights, and low rank with a soft penalty on κ."""

from hf_condlr.baselines.cayley import CayleySGD
from hf_condlr.baselines.penalty import attach_penalty, penalty_gradient, penalty_value
from hf_condlr.baselines.projected import ProjectedSGD
from hf_condlr.baselines.stiefel import orthonormalize_, stiefel_groups

__all__ = [
    "CayleySGD",
    "ProjectedSGD",
    "attach_penalty",
    "orthonormalize_",
    "penalty_gradient",
    "penalty_value",
    "stiefel_groups",
]
