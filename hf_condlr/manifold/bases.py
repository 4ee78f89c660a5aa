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
from hf_condlr.linalg import inverse_factor, inverse_factor_near_identity, per_matrix
from hf_condlr.manifold import masks
from hf_condlr.manifold.masks import as_number, differs, finite, select, usable_squares
from hf_condlr.manifold.stack import Blocks, Stack, join, split


class BasisStack(Stack):
    """Bases U or V, (m, r) each, that have a gradient in this step.

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
        G, norms_squared = self._gradients()
        terms = [self._products(G), as_number(self.usable.logical_not(), norms_squared)]
        if metric_scaling:
            terms.append(torch.stack(torch._foreach_norm([local(S) for S in self.cores])).square().to(G[0].dtype))
        product, unusable, *core_squares = yield terms
        self.usable = unusable == 0
        if metric_scaling:
            c_squared = core_squares[0] / self.start[0].shape[-1]
            c_squared = torch.where(c_squared > 0, c_squared, 1.0)
            # A tiny S can overflow what was finite. If that happens on one process only, `_update` tells the others.
            self.usable = self.usable & usable_squares(norms_squared / c_squared / c_squared)
            for X, c in zip(G, split(per_matrix(c_squared), G), strict=True):
                X /= c
            product = product / per_matrix(c_squared)
        self._subtract(G, select(self.usable, self._tangent(product), 0.0))
        self._zero_unusable(G)
        self._write_gradients(G)

    def retract_update(self, step: int) -> Work[None]:
        """U ← R(U₀ + Δ) with Δ the tangent part of the displacement U − U₀ since the last projection.

        U₀ + Δ = U − U₀(U₀ᵀU − I), since U₀ᵀ(U − U₀) = U₀ᵀU − I. R is Cholesky-QR, and Householder QR where a step of
        several times the size of U makes that inaccurate. What did not move stays bitwise.
        """
        X, unusable = self._update()
        (unusable,) = yield [unusable]
        self._accept(X, unusable)
        moves = join(map(differs, X, self.start))
        product, moves = yield [self._products(X), as_number(moves, X[0])]
        # Momentum, adaptive scaling and weight decay leave the tangent space, even for a tangent gradient.
        product = self._tangent(product)
        product.diagonal(dim1=-2, dim2=-1).sub_(1)
        self._subtract(X, product)
        (gram,) = yield [join(x.mT @ x for x in X)]
        inverse, accurate = _inverse_factor(gram)
        # To see whether Householder QR is needed the host waits for the device. Where it must not, the factor is held.
        if not (self.checksums is not None and masks.runs_ahead(gram)) and not accurate.all():
            rest, matrices = accurate.logical_not(), [x for block in X for x in block.unbind()]
            places = rest.nonzero().flatten().tolist()
            Q, R, _ = yield from qr_of_rows(torch.stack([matrices[i] for i in places]), self.rows)
            for i, q in zip(places, Q, strict=True):
                matrices[i].copy_(q)
            inverse[rest] = torch.eye(inverse.shape[-1], dtype=inverse.dtype, device=inverse.device)
            accurate[rest] = finite(R)
        for x, part, U, sound in zip(X, split(inverse, X), self.start, split(accurate & (moves > 0), X), strict=True):
            torch._foreach_copy_([x], [select(sound, x @ part.mT, U)])
        self._write(X)
        self.remember(X)
        self.usable = self.usable & accurate
        self._record(step)
        self.end_interval()

    def _products(self, X: Blocks) -> Tensor:  # (l, m, r) each -> (L, r, r)
        """U₀ᵀX, of this process's rows."""
        return join(U.mT @ x for U, x in zip(self.start, X, strict=True))

    def _subtract(self, X: Blocks, product: Tensor) -> None:  # (l, m, r) each, (L, r, r)
        """X ← X − U₀ · product, in place."""
        for x, U, part in zip(X, self.start, split(product, X), strict=True):
            x.baddbmm_(U, part, alpha=-1)

    def _tangent(self, product: Tensor) -> Tensor:  # (L, r, r) -> (L, r, r)
        """What of U₀ᵀX a projection takes off: all of it, or with `full_tangent` its symmetric part."""
        return (product + product.mT) / 2 if self.full_tangent else product


def _inverse_factor(gram: Tensor) -> tuple[Tensor, Tensor]:  # (L, r, r) -> (L, r, r), (L,) bool
    """L⁻¹ of XᵀX = LLᵀ, without a decomposition where the host may see that none is needed, and whether it is exact."""
    if not masks.runs_ahead(gram):
        inverse, accurate = inverse_factor_near_identity(gram)
        if accurate.all():
            return inverse, accurate
    return inverse_factor(gram)
