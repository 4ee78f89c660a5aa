"""The manifold step: hooks around an optimizer that keep U, V orthonormal and κ(S) ≤ 1 + τ."""

from hf_condlr.manifold.step import ManifoldStep, attach_manifold_step

__all__ = ["ManifoldStep", "attach_manifold_step"]
