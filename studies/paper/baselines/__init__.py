"""What CondLR is compared with: full-rank layers with orthonormal weights, and low rank with a soft penalty on κ."""

from studies.paper.baselines.cayley import CayleySGD
from studies.paper.baselines.penalty import attach_penalty, penalty_gradient, penalty_value
from studies.paper.baselines.projected import ProjectedSGD
from studies.paper.baselines.stiefel import orthonormalize_, stiefel_groups

__all__ = [
    "CayleySGD",
    "ProjectedSGD",
    "attach_penalty",
    "orthonormalize_",
    "penalty_gradient",
    "penalty_value",
    "stiefel_groups",
]
