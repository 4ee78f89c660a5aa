"""Cores S of equal size: conditioned to the bound of the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_condlr.distributed.collectives import Work
from hf_condlr.linalg import (
    LARGEST_BOUND,
    Center,
    clamp_singular_values,
    clip_core_by_products,
    condition_number,
    is_conditionable,
    wide_device,
)
from hf_condlr.manifold import masks
from hf_condlr.manifold.masks import count, select
from hf_condlr.manifold.stack import Stack, has_gradient


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
        self.by_products = masks.runs_ahead(self.held_at) and max(final for _, final in schedule) <= LARGEST_BOUND

    def begin_step(self) -> None:
        """Before a further step."""
        super().begin_step()
        self.vanished_at = self.vanished_at.to(self.held_at.device)
        self.logarithms = self.logarithms.to(wide_device(self.held_at))

    def sanitize_gradients(self) -> Work:
        """Gradients that are not finite become zero; the cores are marked."""
        if has_gradient(self.parameters[0]):
            G, flags = self._gradients()
            sums = [flags]
            yield sums
            self.usable = sums[0] == 0
            self._write_gradients(select(self.usable, G, 0.0))

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
        start = select(possible, start, identity)
        followed = conditionable
        vanished = conditionable.logical_not() & (S.abs().amax(dim=(1, 2)) < 1)  # the others have overflown
        S = select(conditionable, S, start)
        if self.by_products and (self.ours or (bool(possible.all()) and _obeys(start, previous_bounds))):
            S, clipped = clip_core_by_products(S, bounds, self.center, start)
            followed = followed & clipped
        else:
            S = clamp_singular_values(S, bounds - 1, center=self.center)
        vanished = vanished | (possible | followed).logical_not()
        return select(possible | followed, S, impossible), count(followed, S), count(vanished, S)

    def vanished(self) -> dict[str, int]:
        """{layer: step whose update would have made its S zero}, and forget it. Waits for the device."""
        found = {name: step for name, step in zip(self.layers, self.vanished_at.tolist(), strict=True) if step}
        self.vanished_at = torch.zeros_like(self.vanished_at)
        return found


def _obeys(S: Tensor, bounds: Tensor) -> bool:  # (L, r, r), (L,)
    """Waits for the device. Asked of values, not of history: a resumed training takes the same way."""
    return bool((condition_number(S) <= bounds * (1 + 1e-4)).all())
