"""The manifold step: hooks around an optimizer that keep U, V orthonormal and κ(S) ≤ 1 + τ.

To read in this order: `step` (the two hooks and the handle), `factor_stacks` (the parts of a step, for all factors
together), `stack`, `bases` (U, V: retraction), `cores` (S: the clip), `schedule` (the bound in force). The others serve
them: `grouping` (which factors share a stack), `masks` (choices without a wait for the device), `repair` (factors that
no step wrote), `requirements` and `unguarded` (what is refused).
"""

from hf_condlr.manifold.repair import enforce_constraint
from hf_condlr.manifold.step import ManifoldStep, attach_manifold_step

__all__ = ["ManifoldStep", "attach_manifold_step", "enforce_constraint"]
