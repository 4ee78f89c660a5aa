"""All factors of a model as stacks: the parts of the manifold step, each taken by all stacks together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hf_condlr.distributed.collectives import anywhere, run
from hf_condlr.layers import LowRankLayer
from hf_condlr.linalg import full_precision
from hf_condlr.manifold import masks
from hf_condlr.manifold.bases import BasisStack
from hf_condlr.manifold.cores import CoreStack
from hf_condlr.manifold.grouping import basis_stacks, core_stacks, grouping_key, other_stacks, tolerances
from hf_condlr.manifold.repair import orthonormalize_bases
from hf_condlr.manifold.schedule import BoundSchedule
from hf_condlr.manifold.stack import Stack


class FactorStacks:
    """All factors, stacked, from one projection to the next: those that the optimizer moves, and the others.

    Writes of other code are found by values: each stack keeps a checksum of its factors from one step to the next.

    Args:
        layers: The factored layers.
        schedule: The bound on κ(S) of each.

    Attributes:
        stepping: Gradients are projected, and the update is not yet: the optimizer's step is on, or failed.
        unsettled: Factors may have moved since the last projection.
        interrupted: A projection did not come to its end: some factors are at the values between.
    """

    def __init__(self, layers: dict[str, LowRankLayer], schedule: BoundSchedule) -> None:
        self.layers, self.schedule = layers, schedule
        self._careful = False
        self.reset(0)

    def reset(self, step: int) -> None:
        """Drop all stacks after weights or a state of this step were loaded; the next step looks at every factor."""
        self._bases: list[BasisStack] = []
        self._cores: list[CoreStack] = []
        self._others: list[Stack] = []
        self._key: tuple = ()
        self._tolerances = tolerances(self.layers)
        self.stepping = self.unsettled = self.interrupted = False
        self._projected_at = step
        self._gradients: list[tuple[Tensor | None, int]] = []
        self._written_later: Callable[[], bool] = lambda: False
        self._first_values: dict[str, int] = {}

    def remember_first(self) -> None:
        """Take the present values as those that the first step is to find; see `names_written_before_first`."""
        self._first_values = self._fingerprints()

    def is_repeated(self) -> bool:
        """Whether this step is inside another one, or is repeated: its gradients are those projected last."""
        if not self.stepping or not self._gradients:
            return False
        pairs = zip(_gradients(self.layers), self._gradients, strict=True)
        return all(p is q and version == other for (p, version), (q, other) in pairs)

    def still_fit(self, step: int) -> bool:
        """Whether the stacks hold what the step after `step` moves: the same factors have gradients as in the last."""
        return self._key == grouping_key(self.layers, all_cores=self._cores_must_follow(step))

    def regroup(self, step: int, *, all_cores: bool = False) -> None:
        """Make the stacks of the step after `step`. The old ones must be settled."""
        known: dict[nn.Parameter, Tensor] = {}
        for stack in self._all():
            if stack.checksums is not None:
                known.update(zip(stack.parameters, stack.checksums.unbind(), strict=True))
        all_cores |= self._cores_must_follow(step)
        bases = basis_stacks(self.layers)
        cores = core_stacks(self.layers, self.schedule.endpoints(), all_cores=all_cores)
        others = other_stacks(self.layers, [*bases, *cores])
        for stack in (*bases, *cores, *others):
            if all(p in known for p in stack.parameters):
                stack.checksums = torch.stack([known[p].to(stack.held_at.device) for p in stack.parameters])
        self._bases, self._cores, self._others = bases, cores, others
        self._key, self._tolerances = grouping_key(self.layers, all_cores=all_cores), tolerances(self.layers)

    def keep_values(self) -> bool:
        """Before the optimizer's step: U_old ← U, and likewise V and S.

        Returns:
            Whether other code has, or may have, written factors: then call `start_anew`. The host does not wait for a
            GPU: there such factors are held in this step, and `project` restores them.
        """
        if self.interrupted:
            return True
        if self.stepping:  # an optimizer failed half way: what it did is part of the displacement
            self._forget()
        for stack in (*self._bases, *self._cores):
            if self.unsettled:
                stack.begin_step()
            else:
                stack.begin_interval()
        known = all(stack.checksums is not None for stack in self._all())
        for stack in self._others:
            if stack.checksums is None:
                stack.remember()
            stack.look()
        if not known:
            return not self.unsettled
        flag = _any_written(self._all())
        if self.run_ahead() and not self._careful:
            self._written_later = masks.read_later(flag)
            return False
        return bool(flag)

    def start_anew(self, step: int) -> None:
        """Begin an interval at the present values: bases are made orthonormal, W keeps the value from other code."""
        orthonormalize_bases(self.layers)
        self.stepping = self.unsettled = self.interrupted = False
        self._forget()
        self.regroup(step, all_cores=True)
        self.keep_values()

    def project_gradients(self, metric_scaling: bool) -> None:
        """G_U ← (I − UUᵀ)G_U, likewise V; gradients that are not finite become zero and mark their factors."""
        # From here on an optimizer that fails half way may have moved factors.
        self.stepping, self.unsettled, self._gradients = True, True, []
        bases = (stack.task(stack.project_gradients(metric_scaling)) for stack in self._bases)
        cores = (stack.task(stack.sanitize_gradients()) for stack in self._cores)
        with full_precision():
            run([*bases, *cores])
        self._gradients = _gradients(self.layers)

    def hold_update(self, step: int) -> None:
        """After a step that no projection follows: marked factors go back to their old values. No bound is in force."""
        run([stack.task(stack.hold_update(step)) for stack in (*self._bases, *self._cores)])
        for layer in self.layers.values():
            layer.bound = float("inf")
        self.stepping, self._gradients = False, []
        if self._written_meanwhile():
            self.restore(step)

    def project(self, step: int) -> None:
        """Marked factors go back; U ← R(U + Δ), likewise V; S is conditioned to the bound after `step`."""
        self.interrupted = True  # until it is done
        progress, earlier = self.schedule.progress(step), self.schedule.progress(self._projected_at)
        bases = (stack.task(stack.retract_update(step)) for stack in self._bases)
        cores = (stack.task(stack.condition_update(progress, earlier, step)) for stack in self._cores)
        with full_precision():
            run([*bases, *cores])
        if self._written_meanwhile() or self._tolerances != tolerances(self.layers):
            self.restore(step)
        self._settled(step)

    def restore(self, step: int) -> None:
        """Bring every factor back to the constraint from the values of other code, W as near as the bound allows."""
        orthonormalize_bases(self.layers)
        progress = self.schedule.progress(step)
        cores = core_stacks(self.layers, self.schedule.endpoints(), all_cores=True)
        self._cores = [*self._cores, *cores]  # the flags of the others are still to be read
        self._key = ()  # the next step makes its own stacks
        for stack in cores:
            stack.begin_interval()
        with full_precision():
            run([stack.task(stack.condition_update(progress, progress, step)) for stack in cores])
        for any_stack in self._all():
            any_stack.remember()
        self._settled(step)

    def written(self) -> bool:
        """Whether other code wrote factors since the last step. Waits; all processes must call it."""
        self.names_written()
        return self._all_known() and bool(_any_written(self._all()))

    def names_written(self) -> list[str]:
        """The factors of which other code wrote this process's rows since the last step. Waits for the device."""
        if not self._all_known():
            return []
        for stack in self._all():
            stack.look()
        return [n for x in self._all() for n, flag in zip(x.names, x.written.tolist(), strict=True) if flag]

    def names_written_before_first(self) -> list[str]:
        """The factors that are not those of `remember_first`, until the first step begins."""
        if self._all():
            return []
        return [name for name, value in self._fingerprints().items() if value != self._first_values.get(name)]

    def publish_bounds(self, step: int) -> None:
        """Let each layer state the bound in force after `step`."""
        for name, bound in self.schedule.bounds(step).items():
            self.layers[name].bound = bound

    def held(self) -> dict[str, int]:
        """{factor: first step at which it kept its old value} since this was last asked. Waits for the device."""
        return {name: step for stack in (*self._bases, *self._cores) for name, step in stack.held().items()}

    def vanished(self) -> dict[str, int]:
        """{layer: step whose update would have made its S zero} since this was last asked. Waits for the device."""
        return {name: step for stack in self._cores for name, step in stack.vanished().items()}

    def run_ahead(self) -> bool:
        """Whether reading flags would make the host wait for a device."""
        return any(masks.runs_ahead(stack.held_at) for stack in self._all())

    def _all(self) -> list[Stack]:
        return [*self._bases, *self._cores, *self._others]

    def _all_known(self) -> bool:
        """Whether every stack has checksums of the values that the last step left."""
        return (
            not self.stepping and bool(self._key or self._cores) and all(x.checksums is not None for x in self._all())
        )

    def _fingerprints(self) -> dict[str, int]:
        """{factor: checksum of this process's rows}."""
        found: dict[str, int] = {}
        for stack in other_stacks(self.layers, []):
            stack.remember()
            found.update(zip(stack.names, stack.checksums.tolist(), strict=True))  # type: ignore[union-attr]
        return found

    def _settled(self, step: int) -> None:
        self.stepping = self.unsettled = self.interrupted = False
        self._projected_at, self._gradients = step, []
        self.publish_bounds(step)

    def _forget(self) -> None:
        for stack in self._all():
            stack.checksums = None

    def _cores_must_follow(self, step: int) -> bool:
        """Whether frozen cores are conditioned, too: while bounds tighten, they must follow."""
        return step <= self.schedule.warmup_steps or self._tolerances != tolerances(self.layers)

    def _written_meanwhile(self) -> bool:
        """Whether a factor that must not move has moved: in this step, or before it where the host runs ahead."""
        if self.run_ahead() and not self._careful:
            self._careful = self._written_later()
            return self._careful
        for stack in self._others:
            stack.look()
        return bool(self._others) and bool(_any_written(self._others))


def _any_written(stacks: Sequence[Stack]) -> Tensor:  # () bool
    device = stacks[0].held_at.device
    flag = torch.cat([stack.written.to(device) for stack in stacks]).any()
    return anywhere(flag, [stack.parameters[0] for stack in stacks])


def _gradients(layers: dict[str, LowRankLayer]) -> list[tuple[Tensor | None, int]]:
    """The gradients, and how often each was written."""
    factors: list[nn.Parameter] = [p for x in layers.values() for p in (x.U, x.S, x.V)]
    return [(p.grad, 0 if p.grad is None else p.grad._version) for p in factors]
