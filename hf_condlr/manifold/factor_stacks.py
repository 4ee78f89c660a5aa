"""All factors of a model as stacks: the parts of the manifold step, each taken by all stacks together."""

from __future__ import annotations

from hf_condlr.distributed.collectives import run
from hf_condlr.layers import LowRankLayer
from hf_condlr.linalg import full_precision
from hf_condlr.manifold import masks
from hf_condlr.manifold.bases import BasisStack
from hf_condlr.manifold.change_detection import ChangeDetector
from hf_condlr.manifold.cores import CoreStack
from hf_condlr.manifold.grouping import basis_stacks, core_stacks, grouping_key
from hf_condlr.manifold.orthonormal import orthonormalize_bases
from hf_condlr.manifold.schedule import BoundSchedule


class FactorStacks:
    """The factors that the optimizer moves, stacked, from one projection to the next.

    Args:
        layers: The factored layers.
        schedule: The bound on κ(S) of each.

    Attributes:
        unsettled: Factors may have moved since the last projection.
    """

    def __init__(self, layers: dict[str, LowRankLayer], schedule: BoundSchedule) -> None:
        self.layers, self.schedule = layers, schedule
        self._changes = ChangeDetector(layers)
        self._bases: list[BasisStack] = []
        self._cores: list[CoreStack] = []
        self._key: tuple = ()
        self._changed_by_others = False
        self.unsettled = False

    def reset(self) -> None:
        """After weights or a state were loaded: drop all stacks, and look at every factor before the next step."""
        self._bases, self._cores, self._key = [], [], ()
        self._changed_by_others = self.unsettled = False
        self._changes.mark_changed()

    def repair(self) -> None:
        """Make bases orthonormal again if others have written factors, or changed tolerances, since the projection."""
        if not self.unsettled:
            self._changed_by_others = self._changes.factors_changed() or self._changes.tolerances_changed()
            if self._changed_by_others:
                orthonormalize_bases(self.layers)

    def fit(self, step: int) -> bool:
        """Whether the stacks hold what the step after `step` moves: the same factors have gradients as in the last."""
        return self._key == grouping_key(self.layers, all_cores=self._all_cores(step))

    def regroup(self, step: int) -> None:
        """Make the stacks of the step after `step`. The old ones must be settled."""
        all_cores = self._all_cores(step)
        self._bases = basis_stacks(self.layers)
        self._cores = core_stacks(self.layers, self.schedule.endpoints(), all_cores=all_cores)
        self._key = grouping_key(self.layers, all_cores=all_cores)

    def keep_values(self) -> None:
        """Before the optimizer's step: U_old ← U, and likewise V and S."""
        for stack in self._all():
            if self.unsettled:
                stack.begin_step()
            else:
                stack.begin_interval()
        self.unsettled = True  # from here on: an optimizer that fails half way may have moved factors

    def project_gradients(self, metric_scaling: bool) -> None:
        """G_U ← (I − UUᵀ)G_U, likewise V; gradients that are not finite become zero and mark their factors."""
        bases = (stack.task(stack.project_gradients(metric_scaling)) for stack in self._bases)
        cores = (stack.task(stack.sanitize_gradients()) for stack in self._cores)
        with full_precision():
            run([*bases, *cores])

    def hold_update(self, step: int) -> None:
        """After a step that no projection follows: marked factors go back to their old values. No bound is in force."""
        run([stack.task(stack.hold_update(step)) for stack in self._all()])
        for layer in self.layers.values():
            layer.bound = float("inf")

    def project(self, step: int, previous: int) -> None:
        """Marked factors go back; U ← R(U + Δ), likewise V; S is conditioned to the bound after `step`.

        Args:
            step: Number of the optimizer step.
            previous: A step that is not after the last projection.
        """
        progress = self.schedule.progress(step)
        earlier = self.schedule.progress(max(0, previous))
        bases = (stack.task(stack.retract_update(step)) for stack in self._bases)
        cores = (stack.task(stack.condition_update(progress, earlier, step)) for stack in self._cores)
        with full_precision():
            run([*bases, *cores])
        for stack in self._all():
            stack.end_interval()
        moving = [p for stack in self._all() for p in stack.parameters]
        if self._changes.tolerances_changed() or self._changes.other_factors_changed(moving):
            orthonormalize_bases(self.layers)
            self._condition_all(progress, step)
        self._changes.remember()
        self.unsettled = False
        self.publish_bounds(step)

    def publish_bounds(self, step: int) -> None:
        """Let each layer state the bound in force after `step`."""
        for name, bound in self.schedule.bounds(step).items():
            self.layers[name].bound = bound

    def held(self) -> dict[str, int]:
        """{factor: first step at which it kept its old value} since this was last asked. Waits for the device."""
        return {name: step for stack in self._all() for name, step in stack.held().items()}

    def vanished(self) -> dict[str, int]:
        """{layer: step whose update would have made its S zero} since this was last asked. Waits for the device."""
        return {name: step for stack in self._cores for name, step in stack.vanished().items()}

    def run_ahead(self) -> bool:
        """Whether reading flags would make the host wait for a device."""
        return any(masks.runs_ahead(stack.held_at) for stack in self._all())

    def _all(self) -> list[BasisStack | CoreStack]:
        return [*self._bases, *self._cores]

    def _all_cores(self, step: int) -> bool:
        """Whether frozen cores take part: while bounds tighten, they have to follow."""
        return step <= self.schedule.warmup_steps or self._changed_by_others

    def _condition_all(self, progress: float, step: int) -> None:
        """Condition every core, when tolerances or factors outside of the stacks were changed during the interval."""
        cores = core_stacks(self.layers, self.schedule.endpoints(), all_cores=True)
        self._cores = [*self._cores, *cores]  # the flags of the others are still to be read
        self._key = ()  # the next step makes its own stacks
        for stack in cores:
            stack.begin_interval()
        with full_precision():
            run([stack.task(stack.condition_update(progress, progress, step)) for stack in cores])
        for stack in cores:
            stack.end_interval()
