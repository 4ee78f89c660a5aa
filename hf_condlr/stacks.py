"""Factors of equal shape as one stack (L, m, r): what the manifold step does to them before and after an optimizer.

Everything is batched over the L layers. Where the host runs ahead of the device nothing is read back in a step that
finds the factors as the last one left them: choices are masks, and flags of factors whose gradient or update is not
finite stay on the device until somebody asks. Factors that are new, or that somebody else has written, are looked at.

Factors may be sharded by rows. What then must be summed over the processes, r×r blocks and flags, the methods yield to
`shards.run`; of one process's own, everything is the sum already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from hf_condlr.devices import runs_ahead
from hf_condlr.layers import LowRankLayer
from hf_condlr.linalg import (
    Center,
    clamp_singular_values,
    condition_number,
    is_conditionable,
    joined_qr,
    per_matrix,
    scaled_qr,
    trusted_inverse_cholesky,
    wide_device,
)
from hf_condlr.product_clip import LARGEST_BOUND, clip_core_by_products
from hf_condlr.shards import Work, layout, local, local_gradient, rows_of

# Entries of one stack at most: four temporaries of its size are alive at once, beside one copy of all factors. A GPU
# wants few launches, a CPU stacks that fit its cache.
STACK_LIMIT = {"cpu": 2**18, "others": 2**22}


class Stack:
    """Parameters of equal shape, dtype, device and sharding, with their values before the optimizer's step.

    Attributes:
        rows: Which of the m rows are this process's own: all of them, unless the parameters are sharded.
        entries: Of the r×r blocks of all its matrices.
        start: Values at the last projection, (L, m, r), which obey the constraint if they are ours; held from there to
            the next one. Of own rows, as everything but cores while they are conditioned.
        old: Values before the step, the same in the first one.
        usable: (L,) bool: gradient and update are finite. A factor that is not keeps its old value, on all processes.
        held_at: (L,) int64: the first step since `held` was asked at which a factor was not usable, 0 if it always was.
        ours: The factors are what the last projection of this stack wrote.
    """

    start: Tensor
    old: Tensor
    usable: Tensor

    def __init__(self, names: list[str], parameters: list[nn.Parameter]) -> None:
        self.names, self.parameters = names, parameters
        self.rows = rows_of(parameters[0])
        self.entries = len(parameters) * parameters[0].shape[-1] ** 2
        self.held_at = torch.zeros(len(parameters), dtype=torch.int64, device=parameters[0].device)
        self.ours = False
        self._written: list[int] = []

    def begin_interval(self) -> None:
        """Before the first step since the projection: keep what it finds."""
        self.start = self._values()
        self.ours = self._written == self._versions()
        self.begin_step()

    def begin_step(self) -> None:
        """Before a further step. Copies follow factors that were moved or converted since."""
        self.old = self._values()
        self.start, self.held_at = self.start.to(self.old), self.held_at.to(self.old.device)
        self.usable = torch.ones_like(self.held_at, dtype=torch.bool)

    def end_interval(self) -> None:
        """After the projection: no copy is kept."""
        del self.start, self.old
        self._written = self._versions()

    def hold_update(self) -> Work:
        """After a step that no projection follows: factors that are not usable go back to their old values."""
        new, flags = self._update()
        yield flags
        self._accept(new, *flags)

    def _update(self) -> tuple[Tensor, list[Tensor]]:
        """The values after the step, a fresh tensor, and a list of the flags of those that are not usable."""
        new = self._values()
        return new, [_count(self.usable.logical_not() | _finite(new).logical_not(), new)]

    def _accept(self, new: Tensor, unusable: Tensor) -> Tensor:
        """The values after the step, of which those that are not usable on some process are the old ones again."""
        self.usable = unusable == 0
        if not _surely_all(self.usable):
            new = torch.where(per_matrix(self.usable), new, self.old)
            self._write(new)
        self.old = self.start  # no copy is kept over forward and backward
        return new

    def receive(self, factors: list[Tensor], usable: Tensor, vanished: Tensor, step: int) -> None:
        """Take over what another process made of the same whole factors in step number `step`."""
        torch._foreach_copy_([p.detach() for p in self.parameters], factors)
        self.usable = usable.clone()

    def record(self, step: int) -> None:
        """Note which factors step number `step` held; `held` reads it."""
        self.held_at = torch.where(self.usable.logical_not() & (self.held_at == 0), step, self.held_at)

    def held(self) -> dict[str, int]:
        """{factor: first step at which it kept its old value}, and forget it. Waits for the device."""
        found = {name: step for name, step in zip(self.names, self.held_at.tolist(), strict=True) if step}
        self.held_at = torch.zeros_like(self.held_at)
        return found

    def _versions(self) -> list[int]:
        """Torch counts what is written into a tensor."""
        return [p._version for p in self._own()]

    def _own(self) -> list[Tensor]:
        """The own rows of the parameters; writing into them writes into these."""
        plain = layout(self.parameters[0]) is None
        return list(self.parameters) if plain else [local(p) for p in self.parameters]

    def _values(self) -> Tensor:
        return torch.stack([local(p) for p in self.parameters])

    def _gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients, 0 where they would stay in the optimizer's moments as NaN or inf for ever, and which would."""
        G = torch.stack([local_gradient(p) for p in self.parameters])
        squarable = _squarable(G)
        return _select(squarable, G, 0.0), _count(squarable.logical_not(), G)

    def _write(self, values: Tensor) -> None:
        _copy_each(self._own(), values)

    def _write_gradients(self, values: Tensor) -> None:
        _copy_each([local_gradient(p) for p in self.parameters], values)


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
        G = _select(self.usable, self._project(G, sums[0]), 0.0)
        if metric_scaling:
            c_squared = sums[2] / self.start.shape[-1]
            G = G / per_matrix(torch.where(c_squared > 0, c_squared, 1.0))
            # A tiny S can overflow what was finite; if here only, `_update` tells the others.
            self.usable = self.usable & _squarable(G)
            G = _select(self.usable, G, 0.0)
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
        sound = _finite(displacement)
        displacement = _select(sound, displacement, 0.0)
        moved = _count(_moved(displacement), displacement)
        sums = [self.start.mT @ displacement, moved, _count(sound.logical_not(), displacement)]
        yield sums
        product, moved, unsound = sums
        # Momentum, adaptive scaling and weight decay leave the tangent space, whatever the gradient was.
        X = self._project(displacement, product).add_(self.start)
        sums = [X.mT @ X]
        yield sums
        inverse, sound = trusted_inverse_cholesky(*sums)
        retracted = X @ inverse.mT
        # To see whether it is needed the host waits for the device. Without it the factor is held.
        if not (self.ours and runs_ahead(X)) and not sound.all():
            rest = sound.logical_not()
            Q, R, scale = scaled_qr(X[rest])
            sums = [self.rows.beside(R), self.rows.beside(scale)]
            yield sums
            blocks, R, _ = joined_qr(sums[0], sums[1], self.rows.heights(R.shape[-1]))
            retracted[rest] = Q @ blocks[self.rows.index]
            sound[rest] = _finite(R)
        sound = sound & (unsound == 0)
        self._write(_select(sound & (moved > 0), retracted, self.start))
        self.usable = self.usable & sound


class CoreStack(Stack):
    """Cores S, (L, r, r), also without a gradient, since their bound may have tightened.

    Args:
        layers: Names of the layers.
        parameters: The cores, all with a gradient or all without.
        schedule: Of each layer κ_0, where its bound starts, and 1 + τ, where it ends; for all infinite, or for none.
        center: The interval that singular values are clipped to.
        number: Of the first core among all; where cores are sharded, process `number` % size conditions it.

    Attributes:
        vanished_at: (L,) int64: the step whose update would have made S zero, else 0; S got the values of the last
            projection.
    """

    def __init__(
        self,
        layers: list[str],
        parameters: list[nn.Parameter],
        schedule: list[tuple[float, float]],
        center: Center,
        number: int = 0,
    ) -> None:
        super().__init__([f"{name}.S" for name in layers], parameters)
        self.layers, self.center = layers, center
        self.vanished_at = torch.zeros_like(self.held_at)
        self._turn = (self.rows.index - number) % self.rows.size
        self.bounded = not math.isinf(schedule[0][1])
        self.logarithms = torch.tensor(schedule, dtype=torch.float64, device=wide_device(self.held_at)).log()
        self.by_products = runs_ahead(self.held_at) and max(final for _, final in schedule) <= LARGEST_BOUND

    def begin_step(self) -> None:
        """Before a further step."""
        super().begin_step()
        self.vanished_at = self.vanished_at.to(self.held_at.device)
        self.logarithms = self.logarithms.to(wide_device(self.held_at))

    def sanitize_gradients(self) -> Work:
        """Gradients that are not finite become zero; the cores are marked."""
        if _has_gradient(self.parameters[0]):
            G, flags = self._gradients()
            sums = [flags]
            yield sums
            self.usable = sums[0] == 0
            self._write_gradients(_select(self.usable, G, 0.0))

    def receive(self, factors: list[Tensor], usable: Tensor, vanished: Tensor, step: int) -> None:
        """As `Stack.receive`, and which cores would have become zero."""
        super().receive(factors, usable, vanished, step)
        self.vanished_at = torch.where(vanished & (self.vanished_at == 0), step, self.vanished_at)

    def condition_update(self, progress: float, previous: float, step: int) -> Work:
        """S ← S with κ(S) ≤ κ_0^{1−p} (1+τ)^p, p = `progress`; the last projection had p = `previous` at least.

        Sharded cores are gathered, shared out as whole matrices, and every process keeps its rows of each result.
        """
        new, flags = self._update()
        yield flags
        S = self._accept(new, *flags)
        if self.bounded:
            cores = [self.rows.spread(S), self.rows.spread(self.start)]
            yield cores
            bounds, previous_bounds = self._bounds(progress), self._bounds(previous)
            mine = (self._mine(X) for X in (cores[0], cores[1], bounds, previous_bounds))
            results = [self._of_all(X) for X in self._condition(*mine)]
            yield results
            S, followed, vanished = self.rows.own(results[0]), results[1] > 0, results[2] > 0
            self.usable = self.usable & followed
            self.vanished_at = torch.where(vanished & (self.vanished_at == 0), step, self.vanished_at)
        self._write(S)

    def _mine(self, X: Tensor) -> Tensor:  # (L, *) -> (l, *)
        """Of the L matrices those that this process conditions."""
        return X if self.rows.group is None else X[self._turn :: self.rows.size]

    def _of_all(self, part: Tensor) -> Tensor:  # (l, *) -> (L, *)
        """Its results at their places among zeros."""
        if self.rows.group is None:
            return part
        results = part.new_full((len(self.parameters), *part.shape[1:]), -0.0)
        results[self._turn :: self.rows.size] = part
        return results

    def _bounds(self, progress: float) -> Tensor:  # -> (L,)
        first, last = self.logarithms.unbind(-1)
        return first.lerp(last, progress).exp()

    def _condition(
        self, S: Tensor, start: Tensor, bounds: Tensor, previous_bounds: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # (l, r, r), (l, r, r), (l,), (l,) -> (l, r, r), (l,), (l,)
        """S within `bounds`, which of them follow S, and which S vanished; both are numbers, to be summed."""
        if not len(S):
            return S, S.new_zeros(0), S.new_zeros(0)
        conditionable, possible = is_conditionable(S), is_conditionable(start)
        # A start that is zero or not finite is somebody else's: no value to go back to, and nothing to condition.
        impossible, identity = start, torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        start = _select(possible, start, identity)
        followed = conditionable
        vanished = conditionable.logical_not() & (S.abs().amax(dim=(1, 2)) < 1)  # the others have overflown
        S = _select(conditionable, S, start)
        if self.by_products and (self.ours or (bool(possible.all()) and _obeys(start, previous_bounds))):
            S, clipped = clip_core_by_products(S, bounds, self.center, start)
            followed = followed & clipped
        else:
            S = clamp_singular_values(S, bounds - 1, center=self.center)
        vanished = vanished | (possible | followed).logical_not()
        return _select(possible | followed, S, impossible), _count(followed, S), _count(vanished, S)

    def vanished(self) -> dict[str, int]:
        """{layer: step whose update would have made its S zero}, and forget it. Waits for the device."""
        found = {name: step for name, step in zip(self.layers, self.vanished_at.tolist(), strict=True) if step}
        self.vanished_at = torch.zeros_like(self.vanished_at)
        return found


def moving_factors(layers: dict[str, LowRankLayer], *, all_cores: bool = False) -> tuple:
    """What stacks depend on: which factors have a gradient, which S train, or move with their bound. To compare."""
    return tuple(
        (
            *((id(p), p.dtype, p.device, _has_gradient(p)) for p in (x.U, x.S, x.V)),
            *(x.S.requires_grad, all_cores or x.S.requires_grad, x.tau, x.center),
        )
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


def core_stacks(
    layers: dict[str, LowRankLayer], initial_condition: dict[str, float], *, all_cores: bool = False
) -> list[CoreStack]:
    """The trainable S, or all of them, stacked by shape, dtype, device and what `CoreStack` asks of its members."""
    rows = (
        (name, S, (initial_condition[name], 1 + layer.tau), (layer.center, math.isinf(layer.tau), _has_gradient(S)))
        for name, layer in layers.items()
        for S in (layer.S,)
        if all_cores or S.requires_grad
    )
    stacks: list[CoreStack] = []
    for names, ps, schedule, keys in _grouped(rows):
        stacks.append(CoreStack(names, ps, schedule, keys[0][0], sum(len(stack.layers) for stack in stacks)))
    return stacks


def _finite(X: Tensor) -> Tensor:  # (L, m, r) -> (L,) bool
    """Whether every entry is finite, from the extremes: NaN is one of them; 30 times cheaper than `isfinite(X)`."""
    if not X.numel():  # no rows on this process
        return torch.ones(len(X), dtype=torch.bool, device=X.device)
    flat = X.flatten(1)
    return torch.isfinite(flat.amax(1)) & torch.isfinite(flat.amin(1))


def _squarable(G: Tensor) -> Tensor:  # (L, m, r) -> (L,) bool
    """Whether every entry is finite and so small that optimizers can sum its squares: up to 2.6e15 in float32."""
    if not G.numel():
        return _finite(G)
    flat = G.flatten(1)
    return torch.maximum(flat.amax(1), -flat.amin(1)) <= torch.finfo(G.dtype).max ** 0.4


def _moved(displacement: Tensor) -> Tensor:  # (L, m, r) -> (L,) bool
    if not displacement.numel():
        return torch.zeros(len(displacement), dtype=torch.bool, device=displacement.device)
    return (displacement.flatten(1).amax(1) != 0) | (displacement.flatten(1).amin(1) != 0)


def _obeys(S: Tensor, bounds: Tensor) -> bool:  # (L, r, r), (L,)
    """Waits for the device. Asked of values, not of history: a resumed training takes the same way."""
    return bool((condition_number(S) <= bounds * (1 + 1e-4)).all())


def _count(flags: Tensor, like: Tensor) -> Tensor:  # (L,) bool -> (L,)
    """Numbers of the dtype that matrices are summed in, to be summed with them."""
    return flags.to(like.dtype)


def _surely_all(mask: Tensor) -> bool:
    """Whether a mask is all true, as far as can be told without a wait for the device."""
    return not runs_ahead(mask) and bool(mask.all())


def _select(mask: Tensor, X: Tensor, otherwise: Tensor | float) -> Tensor:  # (L,), (L, m, r) -> (L, m, r)
    """`torch.where` along the stack, if possible without a copy in the usual case that the mask is all true."""
    return X if _surely_all(mask) else torch.where(per_matrix(mask), X, otherwise)


def _has_gradient(p: nn.Parameter) -> bool:
    return p.requires_grad and p.grad is not None


def _copy_each(targets: list[Tensor], values: Tensor) -> None:  # L × (m, r), (L, m, r)
    torch._foreach_copy_(targets, list(values.unbind()))


def _grouped(rows: Iterable[tuple]) -> Iterator[tuple[list, ...]]:
    """Rows (name, parameter, ..., key) with equal shape, dtype, device, sharding and key, transposed to lists.

    Groups of more than `STACK_LIMIT` entries are split.
    """
    groups: dict[tuple, list[tuple]] = {}
    for row in rows:
        p = row[1]
        groups.setdefault((p.shape, p.dtype, p.device, layout(p), row[-1]), []).append(row)
    for group in groups.values():
        p = group[0][1]
        size = max(1, STACK_LIMIT.get(p.device.type, STACK_LIMIT["others"]) // p.numel())
        for i in range(0, len(group), size):
            yield tuple(list(column) for column in zip(*group[i : i + size], strict=True))
