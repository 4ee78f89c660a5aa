"""Bases U and V of equal shape: their gradients are projected before the optimizer's step, they are retracted after it.

Formulas are written for U, with U₀ = `start`. Each `yield` asks for the sums of its terms over all processes that hold
rows of these factors (`distributed.collectives`); with one process they come back as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_condlr.distributed.collectives import Work
from hf_condlr.distributed.sharded_linalg import qr_of_rows
from hf_condlr.distributed.shards import local
from hf_condlr.linalg import per_matrix, project_horizontal, project_tangent, retract_cholesky
from hf_condlr.manifold import masks
from hf_condlr.manifold.masks import as_number, finite, moved, select, squarable
from hf_condlr.manifold.stack import Stack


class BasisStack(Stack):
    """Bases U or V, (L, m, r), that have a gradient in this step.

    Args:
        names: Names of the factors, "layer.U" or "layer.V".
        parameters: The factors.
        cores: S of each factor's layer.
        full_tangent: S is frozen, so that it cannot absorb U's rotation within its span: keep that rotation.
    """

    def __init__(
        self, names: list[str], parameters: list[nn.Parameter], cores: list[nn.Parameter], full_tangent: bool
    ) -> None:
        super().__init__(names, parameters)
        self.cores, self.full_tangent = cores, full_tangent

    def project_gradients(self, metric_scaling: bool) -> Work[None]:
        """G ← (I − U₀U₀ᵀ)G, or G − U₀ sym(U₀ᵀG) with `full_tangent`; with `metric_scaling` divided by c² = ‖S‖_F²/r."""
        G, unusable = self._gradients()
        terms = [self.start.mT @ G, unusable]
        if metric_scaling:
            terms.append(torch.stack(torch._foreach_norm([local(S) for S in self.cores])).square().to(G.dtype))
        product, unusable, *squares = yield terms
        self.usable = unusable == 0
        G = select(self.usable, self._tangent_part(G, product), 0.0)
        if metric_scaling:
            c_squared = squares[0] / self.start.shape[-1]
            G = G / per_matrix(torch.where(c_squared > 0, c_squared, 1.0))
            # A tiny S can overflow what was finite. If that happens on one process only, `_update` tells the others.
            self.usable = self.usable & squarable(G)
            G = select(self.usable, G, 0.0)
        self._write_gradients(G)

    def retract_update(self, step: int) -> Work[None]:
        """U ← R(U₀ + Δ) with Δ the tangent part of the displacement U − U₀ since the last projection.

        R is Cholesky-QR, and Householder QR where a step of several times the size of U makes that inaccurate. What
        did not move stays bitwise.
        """
        new, unusable = self._update()
        (unusable,) = yield [unusable]
        displacement = self._accept(new, unusable).sub_(self.start)
        finite_here = finite(displacement)
        displacement = select(finite_here, displacement, 0.0)
        product, moves, not_finite = yield [
            self.start.mT @ displacement,
            as_number(moved(displacement), displacement),
            as_number(finite_here.logical_not(), displacement),
        ]
        # Momentum, adaptive scaling and weight decay leave the tangent space, even for a tangent gradient.
        X = self._tangent_part(displacement, product).add_(self.start)
        (gram,) = yield [X.mT @ X]
        retracted, accurate = retract_cholesky(X, gram)
        # To see whether Householder QR is needed the host waits for the device. Where it must not, the factor is held.
        if not (self.checksums is not None and masks.runs_ahead(X)) and not accurate.all():
            rest = accurate.logical_not()
            retracted[rest], R, _ = yield from qr_of_rows(X[rest], self.rows)
            accurate[rest] = finite(R)
        sound = accurate & (not_finite == 0)
        result = select(sound & (moves > 0), retracted, self.start)
        self._write(result)
        self.remember(result)
        self.usable = self.usable & sound
        self._record(step)

    def _tangent_part(self, X: Tensor, product: Tensor) -> Tensor:  # (L, m, r), (L, r, r) -> (L, m, r)
        """X projected on the tangent space at U₀ (`full_tangent`) or its horizontal part, given U₀ᵀX of all rows."""
        project = project_tangent if self.full_tangent else project_horizontal
        return project(self.start, X, product)
