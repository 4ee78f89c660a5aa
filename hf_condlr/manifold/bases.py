"""Bases U and V of equal shape: projected gradients, and retraction of what the optimizer moved."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_condlr.distributed.collectives import Work
from hf_condlr.distributed.rows import local
from hf_condlr.linalg import joined_qr, per_matrix, scaled_qr, trusted_inverse_cholesky
from hf_condlr.manifold import masks
from hf_condlr.manifold.masks import count, finite, moved, select, squarable
from hf_condlr.manifold.stack import Stack


class BasisStack(Stack):
    """Bases U or V, (L, m, r), that have a gradient in this step.

    Args:
        names: Of the factors, "layer.U" or "layer.V".
        parameters: The factors.
        cores: Each one's S.
        full_tangent: S is frozen, so that U's rotation within its span matters and is kept.
    """

    def __init__(
        self, names: list[str], parameters: list[nn.Parameter], cores: list[nn.Parameter], full_tangent: bool
    ) -> None:
        super().__init__(names, parameters)
        self.cores, self.full_tangent = cores, full_tangent

    def _project(self, G: Tensor, product: Tensor) -> Tensor:  # (L, m, r), (L, r, r) -> (L, m, r)
        """(I − UUᵀ)G, or G − U sym(UᵀG), by the product UᵀG of all rows; U of the last projection."""
        if self.full_tangent:
            product = (product + product.mT) / 2
        return G - self.start @ product

    def project_gradients(self, metric_scaling: bool) -> Work:
        """G ← (I − UUᵀ)G with U of the last projection; with `metric_scaling` divided by c² = ‖S‖_F²/r."""
        G, flags = self._gradients()
        sums = [self.start.mT @ G, flags]
        if metric_scaling:
            sums.append(torch.stack(torch._foreach_norm([local(S) for S in self.cores])).square().to(G.dtype))
        yield sums
        self.usable = sums[1] == 0
        G = select(self.usable, self._project(G, sums[0]), 0.0)
        if metric_scaling:
            c_squared = sums[2] / self.start.shape[-1]
            G = G / per_matrix(torch.where(c_squared > 0, c_squared, 1.0))
            # A tiny S can overflow what was finite; if here only, `_update` tells the others.
            self.usable = self.usable & squarable(G)
            G = select(self.usable, G, 0.0)
        self._write_gradients(G)

    def retract_update(self) -> Work:
        """U ← R(U + Δ), Δ the tangent part of the displacement since the last projection.

        X = U + Δ has XᵀX = LLᵀ and R(X) = X L⁻ᵀ (Cholesky-QR). For horizontal Δ, XᵀX = I + ΔᵀΔ, and it takes a step of
        several times the size of U to make that so ill-conditioned that Householder's QR has to take over. What did
        not move stays bitwise.
        """
        new, sums = self._update()
        yield sums
        displacement = self._accept(new, *sums).sub_(self.start)
        sound = finite(displacement)
        displacement = select(sound, displacement, 0.0)
        sums = [
            self.start.mT @ displacement,
            count(moved(displacement), displacement),
            count(sound.logical_not(), displacement),
        ]
        yield sums
        product, moves, unsound = sums
        # Momentum, adaptive scaling and weight decay leave the tangent space, whatever the gradient was.
        X = self._project(displacement, product).add_(self.start)
        sums = [X.mT @ X]
        yield sums
        inverse, sound = trusted_inverse_cholesky(*sums)
        retracted = X @ inverse.mT
        # To see whether it is needed the host waits for the device. Without it the factor is held.
        if not (self.ours and masks.runs_ahead(X)) and not sound.all():
            rest = sound.logical_not()
            Q, R, scale = scaled_qr(X[rest])
            sums = [self.rows.beside(R), self.rows.beside(scale)]
            yield sums
            blocks, R, _ = joined_qr(sums[0], sums[1], self.rows.heights(R.shape[-1]))
            retracted[rest] = Q @ blocks[self.rows.index]
            sound[rest] = finite(R)
        sound = sound & (unsound == 0)
        self._write(select(sound & (moves > 0), retracted, self.start))
        self.usable = self.usable & sound
