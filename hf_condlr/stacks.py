"""Factors of equal shape as one stack (L, m, r): what the manifold step does to them before and after an optimizer.

A stack lives from one projection to the next, by default for one step. Everything is batched over the L layers; the
flags of layers whose gradient or update is not finite stay on the device until the end of the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from hf_condlr.layers import LowRankLayer
from hf_condlr.linalg import (
    Center,
    clamp_singular_values,
    is_conditionable,
    project_horizontal,
    project_tangent,
    retract_cholesky,
    retract_polar,
)


class Stack:
    """Parameters of equal shape, dtype and device, with their values before the optimizer's step.

    Attributes:
        start: Values at the last projection, (L, m, r); those obey the constraint.
        old: Values before the step, the same in the first one.
        usable: (L,) bool: gradient and update are finite. A factor that is not keeps its old value.
    """

    def __init__(self, names: list[str], parameters: list[nn.Parameter]) -> None:
        self.names, self.parameters = names, parameters
        self.start = self.old = torch.stack([p.detach() for p in parameters])
        self.usable = self._all_usable()

    def begin_step(self) -> None:
        """Before a further step since the projection: keep what it finds."""
        self.old = torch.stack([p.detach() for p in self.parameters])
        self.usable = self._all_usable()

    def finite_update(self) -> Tensor:  # -> (L, m, r)
        """The values after the step, a fresh tensor; factors that are not usable go back to their old ones."""
        new = torch.stack([p.detach() for p in self.parameters])
        self.usable &= _finite(new)
        if not self.usable.all():
            new = torch.where(self.usable[:, None, None], new, self.old)
            self._write(new)
        self.old = self.start  # no copy is kept over forward and backward
        return new

    def held(self) -> list[str]:
        """Names of the factors that kept their old value. Waits for the device."""
        return [name for name, usable in zip(self.names, self.usable.tolist(), strict=True) if not usable]

    def _all_usable(self) -> Tensor:
        return torch.ones(len(self.parameters), dtype=torch.bool, device=self.old.device)

    def _finite_gradients(self, parameters: list[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """Gradients, 0 where not finite (they would stay in the optimizer's moments for ever), and which were."""
        G = torch.stack(_gradients(parameters))
        finite = _finite(G)
        return _select(finite, G, torch.zeros(())), finite

    def _write(self, values: Tensor) -> None:
        _copy_each(self.parameters, values)


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
        self.cores = cores
        self.project = project_tangent if full_tangent else project_horizontal
        self.retract = retract_polar if full_tangent else retract_cholesky

    def project_gradients(self, metric_scaling: bool) -> None:
        """G ← (I − UUᵀ)G with U of the last projection; with `metric_scaling` divided by c² = ‖S‖_F²/r."""
        G, self.usable = self._finite_gradients(self.parameters)
        G = self.project(self.start, G)
        if metric_scaling:
            r = self.start.shape[-1]
            c_squared = torch.stack([S.detach().square().sum() / r for S in self.cores]).to(G.dtype)
            G = G / torch.where(c_squared > 0, c_squared, 1.0)[:, None, None]
            self.usable &= _finite(G)  # a tiny S can overflow what was finite
            G = _select(self.usable, G, torch.zeros(()))
        _copy_each(_gradients(self.parameters), G)

    def retract_update(self) -> None:
        """U ← R(U + Δ), Δ the tangent part of the displacement since the last projection.

        What did not move stays bitwise.
        """
        displacement = self.finite_update().sub_(self.start)
        moved = (displacement.flatten(1).amax(1) != 0) | (displacement.flatten(1).amin(1) != 0)
        sound = _finite(displacement)
        # Momentum, adaptive scaling and weight decay leave the tangent space, whatever the gradient was.
        displacement = self.project(self.start, _select(sound, displacement, torch.zeros(())))
        retracted = self.retract(displacement.add_(self.start))
        sound &= _finite(retracted)
        self._write(_select(sound & moved, retracted, self.start))
        self.usable &= sound


class CoreStack(Stack):
    """Cores S, (L, r, r), also without a gradient, since their bound may have tightened.

    Attributes:
        vanished: Layers whose update would have made S zero; they get the values of the last projection.
    """

    def __init__(self, layers: list[str], parameters: list[nn.Parameter], center: Center) -> None:
        super().__init__([f"{name}.S" for name in layers], parameters)
        self.layers, self.center = layers, center
        self.vanished: list[str] = []

    def sanitize_gradients(self) -> None:
        """Gradients that are not finite become zero; the cores are marked."""
        index = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        if index:
            parameters = [self.parameters[i] for i in index]
            G, self.usable[index] = self._finite_gradients(parameters)
            _copy_each(_gradients(parameters), G)

    def condition_update(self, bounds: list[float]) -> None:
        """S ← S with κ(S) ≤ its bound, `bounds` in the order of the layers."""
        S = self.finite_update()
        index = [i for i, bound in enumerate(bounds) if not math.isinf(bound)]
        if index:
            tau = torch.tensor([bounds[i] - 1 for i in index], dtype=torch.float64)
            S[index] = self._condition(S[index], index, tau)
        self._write(S)

    def _condition(self, S: Tensor, index: list[int], tau: Tensor) -> Tensor:
        conditionable = is_conditionable(S)
        if not conditionable.all():
            vanished = ~conditionable & (S.abs().amax(dim=(1, 2)) < 1)
            self.vanished += [self.layers[i] for i, gone in zip(index, vanished.tolist(), strict=True) if gone]
            self.usable[index] &= conditionable  # the others have overflown
            S = _select(conditionable, S, self.start[index])
        return clamp_singular_values(S, tau, center=self.center)


def moving_factors(layers: dict[str, LowRankLayer], *, all_cores: bool = False) -> tuple:
    """What stacks depend on: which U and V have a gradient, which S train, or move with their bound. To compare."""
    return tuple(
        (_has_gradient(x.U), _has_gradient(x.V), x.S.requires_grad, all_cores or x.S.requires_grad)
        for x in layers.values()
    )


def basis_stacks(layers: dict[str, LowRankLayer]) -> list[BasisStack]:
    """The trainable U and V that have a gradient, stacked by shape, dtype and device."""
    rows = (
        (f"{name}.{kind}", p, layer.S, not layer.S.requires_grad)
        for name, layer in layers.items()
        for kind, p in (("U", layer.U), ("V", layer.V))
        if _has_gradient(p)
    )
    return [BasisStack(names, ps, cores, flags[0]) for names, ps, cores, flags in _grouped(rows)]


def core_stacks(layers: dict[str, LowRankLayer], *, all_cores: bool = False) -> list[CoreStack]:
    """The trainable S, or all of them, stacked by shape, dtype, device and center."""
    rows = ((name, layer.S, layer.center) for name, layer in layers.items() if all_cores or layer.S.requires_grad)
    return [CoreStack(names, ps, centers[0]) for names, ps, centers in _grouped(rows)]


def _finite(X: Tensor) -> Tensor:  # (L, m, r) -> (L,) bool
    """Whether every entry is finite, from the extremes: NaN is one of them; 30 times cheaper than `isfinite(X)`."""
    flat = X.flatten(1)
    return torch.isfinite(flat.amax(1)) & torch.isfinite(flat.amin(1))


def _select(mask: Tensor, X: Tensor, otherwise: Tensor) -> Tensor:  # (L,), (L, m, r) -> (L, m, r)
    """`torch.where` along the stack, without a copy in the usual case that the mask is all true."""
    return X if mask.all() else torch.where(mask[:, None, None], X, otherwise.to(X))


def _has_gradient(p: nn.Parameter) -> bool:
    return p.requires_grad and p.grad is not None


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _copy_each(targets: Sequence[Tensor], values: Tensor) -> None:  # L × (m, r), (L, m, r)
    torch._foreach_copy_(list(targets), list(values.unbind()))


def _grouped(rows: Iterable[tuple]) -> Iterator[tuple[list, ...]]:
    """Rows (name, parameter, ..., key) with equal shape, dtype, device and key, transposed to lists."""
    groups: dict[tuple, list[tuple]] = {}
    for row in rows:
        p = row[1]
        groups.setdefault((p.shape, p.dtype, p.device, row[-1]), []).append(row)
    for group in groups.values():
        yield tuple(list(column) for column in zip(*group, strict=True))
