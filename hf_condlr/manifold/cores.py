"""Cores S of equal size: conditioned to the bound in force after the optimizer's step."""

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
    obeys_bound,
    wide_device,
)
from hf_condlr.manifold import masks
from hf_condlr.manifold.masks import as_number, select
from hf_condlr.manifold.schedule import bound_at
from hf_condlr.manifold.stack import Stack, has_gradient


class CoreStack(Stack):
    """Cores S, (L, r, r). Those without a gradient belong to it too, since their bound may have tightened.

    Args:
        layer_names: Names of the layers.
        parameters: The cores, all with a gradient or all without.
        endpoints: κ_0 and 1 + τ of each layer, where its bound starts and ends; 1 + τ is inf for all or for none.
        center: The interval that singular values are clipped to.
        number: Number of the first core among all cores. Core `number` of a sharded model is conditioned by process
            `number` % size.

    Attributes:
        vanished_at: (L,) int64: the first step since the last `vanished` whose update would have made S zero; 0 if
            none. S got its value at the last projection back.
    """

    copied = True

    def __init__(
        self,
        layer_names: list[str],
        parameters: list[nn.Parameter],
        endpoints: list[tuple[float, float]],
        center: Center,
        number: int = 0,
    ) -> None:
        super().__init__([f"{name}.S" for name in layer_names], parameters)
        self.layer_names, self.center = layer_names, center
        self.vanished_at = torch.zeros_like(self.held_at)
        self._turn = (self.rows.index - number) % self.rows.size
        self.bounded = not math.isinf(endpoints[0][1])
        self.endpoints = torch.tensor(endpoints, dtype=torch.float64, device=wide_device(self.held_at))
        self.by_products = masks.runs_ahead(self.held_at) and max(final for _, final in endpoints) <= LARGEST_BOUND

    def begin_step(self) -> None:
        """See `Stack.begin_step`."""
        super().begin_step()
        self.vanished_at = self.vanished_at.to(self.held_at.device)
        self.endpoints = self.endpoints.to(wide_device(self.held_at))

    def sanitize_gradients(self) -> Work[None]:
        """Gradients that are not finite become zero, and their cores are marked."""
        if has_gradient(self.parameters[0]):
            G, norms_squared = self._gradients()
            (unusable,) = yield [as_number(self.usable.logical_not(), norms_squared)]
            self.usable = unusable == 0
            self._zero_unusable(G)
            self._write_gradients(G)

    def condition_update(self, progress: float, previous: float, step: int) -> Work[None]:
        """S ← S with κ(S) ≤ κ_0^{1−p} (1+τ)^p, p = `progress`; S₀ = `start` obeys the bound at `previous`.

        Sharded cores are gathered, each is conditioned by one process, and every process keeps its rows of the results.
        """
        new, unusable = self._update()
        (unusable,) = yield [unusable]
        self._accept(new, unusable)
        (S,) = new
        if self.bounded:
            S, start = yield [self.rows.spread(S), self.rows.spread(self.start[0])]
            initial, final = self.endpoints.unbind(-1)
            bounds = bound_at(initial, final, progress)
            previous_bounds = bound_at(initial, final, previous) if self.by_products else bounds  # else not looked at
            results = self._condition(*map(self._own_cores, (S, start, bounds, previous_bounds)))
            S, followed, vanished = yield [self._among_all(X) for X in results]
            S = self.rows.own(S)
            self.usable = self.usable & (followed > 0)
            self.vanished_at = torch.where((vanished > 0) & (self.vanished_at == 0), step, self.vanished_at)
        self._write([S])
        self.remember([S])
        self._record(step)
        self.end_interval()

    def vanished(self) -> dict[str, int]:
        """{layer: step whose update would have made its S zero}; clears the record. Waits for the device."""
        found = {name: step for name, step in zip(self.layer_names, self.vanished_at.tolist(), strict=True) if step}
        self.vanished_at = torch.zeros_like(self.vanished_at)
        return found

    def _own_cores(self, X: Tensor) -> Tensor:  # (L, *) -> (l, *)
        """Select those of L matrices or numbers whose cores this process conditions."""
        return X if self.rows.group is None else X[self._turn :: self.rows.size]

    def _among_all(self, part: Tensor) -> Tensor:  # (l, *) -> (L, *)
        """This process's results in their places among zeros."""
        if self.rows.group is None:
            return part
        results = part.new_full((len(self.parameters), *part.shape[1:]), -0.0)
        results[self._turn :: self.rows.size] = part
        return results

    def _condition(
        self, S: Tensor, start: Tensor, bounds: Tensor, previous_bounds: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:  # (l, r, r), (l, r, r), (l,), (l,) -> (l, r, r), (l,), (l,)
        """S within `bounds`, which of the results follow S, and which S vanished; both as numbers, to be summed."""
        if not len(S):
            return S, S.new_zeros(0), S.new_zeros(0)
        conditionable, start_is_usable = is_conditionable(S), is_conditionable(start)
        # A start that is zero or not finite was written by other code: there is no value to return to.
        given_start, identity = start, torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
        start = select(start_is_usable, start, identity)
        followed = conditionable
        vanished = conditionable.logical_not() & (S.abs().amax(dim=(1, 2)) < 1)  # the others have overflowed
        S = select(conditionable, S, start)
        if self.by_products and (
            self.checksums is not None or (bool(start_is_usable.all()) and _obey(start, previous_bounds))
        ):
            S, clipped = clip_core_by_products(S, bounds, self.center, start)
            followed = followed & clipped
        else:
            S = clamp_singular_values(S, bounds - 1, center=self.center)
        vanished = vanished | (start_is_usable | followed).logical_not()
        return select(start_is_usable | followed, S, given_start), as_number(followed, S), as_number(vanished, S)


def _obey(S: Tensor, bounds: Tensor) -> bool:  # (L, r, r), (L,)
    """Whether all cores obey their bounds. Decided by values, so that a resumed training decides the same; waits."""
    return bool(obeys_bound(condition_number(S), bounds).all())
