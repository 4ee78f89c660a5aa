"""The manifold step: two hooks that keep U, V orthonormal and κ(S) ≤ 1 + τ under any Euclidean optimizer.

Riemannian gradient flow on the factors, U̇ = −(I−UUᵀ) G_U (SSᵀ)⁻¹, V̇ = −(I−VVᵀ) G_V (SᵀS)⁻¹, Ṡ = −G_S (arXiv
2306.01485). κ(S) ≤ 1 + τ makes (SSᵀ)⁻¹ ≈ c⁻² I, c² = ‖S‖_F²/r, so that an ordinary optimizer can integrate it.

Before `optimizer.step()`:
1. U₀, V₀ and S₀ are kept, the values at the last projection: with `projection_interval` = 1 those of the last step;
2. gradients that are not finite become zero, and their factors are marked;
3. G_U ← (I − U₀U₀ᵀ)G_U, or G_U − U₀ sym(U₀ᵀG_U) where S is frozen; likewise G_V;
4. G_U ← G_U / c² with metric scaling.
After it:
5. marked factors get their old values back; of the others Δ ← (I − U₀U₀ᵀ)(U_new − U₀);
6. U ← R(U₀ + Δ), the retraction, by Cholesky-QR;
7. the singular values of S are clipped so that κ(S) ≤ 1 + τ(t); a core that obeys the bound stays bitwise as it is.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import extract_model_from_parallel
from torch import nn

from hf_condlr.distributed.replicas import check_replicas, is_due, several_processes
from hf_condlr.distributed.shards import reshard
from hf_condlr.errors import ConditioningError, OptimizerError, listed, require
from hf_condlr.layers import LowRankUpdate, ModuleTree, factored_layers
from hf_condlr.linalg import obeys_bound
from hf_condlr.manifold.factor_stacks import FactorStacks
from hf_condlr.manifold.repair import orthonormalize_bases
from hf_condlr.manifold.requirements import (
    check_attached,
    check_layers,
    check_optimizer,
    check_wrappers,
    clear_non_finite_state,
    factors_of,
    is_skipped,
    with_evaluated_closure,
    with_inner,
)
from hf_condlr.manifold.schedule import BoundSchedule, kappa_of, require_count
from hf_condlr.manifold.unguarded import forget, guard

logger = logging.getLogger(__name__)


def attach_manifold_step(
    optimizer: Any,
    model: nn.Module,
    *,
    warmup_steps: int = 0,
    metric_scaling: bool | None = None,
    projection_interval: int = 1,
    drift_check_interval: int = 100,
) -> ManifoldStep:
    """Keep the constraint of every factored layer of `model` under `optimizer`, from its next step on. Call it once.

    Nothing else changes in a training loop: `loss.backward(); optimizer.step(); optimizer.zero_grad()`, under plain
    torch or accelerate, before or after `accelerator.prepare`. Gradient clipping sees the gradients as backward left
    them, before the projection. Bases that are not orthonormal are made so, and W stays what it is. A copy or a pickle
    of the optimizer has lost the step, since torch drops its hooks: attach again.

    Args:
        optimizer: Any `torch.optim.Optimizer` that holds the trainable factors, or accelerate's wrapper of it.
        model: A model with `LowRankLinear` or `LowRankConv2d` layers, wrapped by DDP, sharded by `fully_shard`, or
            neither. With a sharded one every process must do the same: attach, step, `settle()`, `load_state_dict()`.
        warmup_steps: T_w ≥ 0, in optimizer steps. The bound falls geometrically from each layer's own κ_0 to 1 + τ:
            1 + τ(t) = κ_0^{1−p} (1+τ)^p with p = min(1, t/T_w). With 0 the first step conditions to 1 + τ.
        metric_scaling: Divide the gradients of U and V by c² = ‖S‖_F²/r, as the flow does. None: on for SGD, off for
            other optimizers, which rescale gradients themselves, and for adapters, whose S starts near zero.
        projection_interval: k ≥ 1. Retract and condition after every k-th step only, which is most of the cost. In
            between the constraint does **not** hold: call `settle()` of the handle, on every process, before you
            evaluate, save or load weights, and at the end. See `ManifoldStep.settle`.
        drift_check_interval: Where several processes hold copies of the factors, compare the copies bit for bit after
            the first step and after every k-th one, with the same k on every process. 0 never compares, for processes
            that train different models; each warm-up then starts from the process's own κ_0 instead of process 0's.

    Returns:
        A handle: `step_count`, `bounds()`, `settle()`, `check()`, `state_dict()`, `load_state_dict()`, `remove()`.

    Raises:
        OptimizerError: The guarantee cannot be kept: factors missing from the optimizer, in half precision, flattened
            or sharded otherwise than by rows, attached already, a frozen S that is worse conditioned than its bound,
            or a schedule-free optimizer.
    """
    return ManifoldStep(optimizer, model, warmup_steps, metric_scaling, projection_interval, drift_check_interval)


class ManifoldStep:
    """The handle of an attached step; `attach_manifold_step` explains the arguments.

    Attributes:
        layers: {name: factored layer}.
        schedule: The bound on κ(S) of each layer, by step.
        step_count: t, the number of optimizer steps taken.
    """

    def __init__(
        self,
        optimizer: Any,
        model: nn.Module,
        warmup_steps: int,
        metric_scaling: bool | None,
        projection_interval: int,
        drift_check_interval: int,
    ) -> None:
        require_count("projection_interval", projection_interval, 1, "1 projects after every step.")
        require_count("drift_check_interval", drift_check_interval, 0, "0 never compares.")
        check_wrappers(optimizer, model)
        self.optimizers = with_inner(optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer)
        self._model = extract_model_from_parallel(model, keep_torch_compile=False)
        reshard(self._model)
        self.layers = factored_layers(self._model)
        check_optimizer(self.optimizers[0], self._model, self.layers)
        check_attached(self.optimizers, self.layers, ManifoldStep)
        self._tree = ModuleTree(self._model)
        plain = any(isinstance(x, torch.optim.SGD) for x in self.optimizers)
        plain = plain and not any(isinstance(x, LowRankUpdate) for x in self.layers.values())
        self.metric_scaling = plain if metric_scaling is None else metric_scaling
        self.projection_interval, self.drift_check_interval = projection_interval, drift_check_interval
        self.step_count = 0
        orthonormalize_bases(self.layers)
        self.schedule = BoundSchedule(self.layers, warmup_steps)
        self._stacks = FactorStacks(self.layers, self.schedule)
        self._stacks.remember_first()
        self._outermost: torch.optim.Optimizer | None = None  # of the optimizers whose step is on; None where skipped
        self._warned = False
        self._hooks = [x.register_step_pre_hook(self._before) for x in self.optimizers]
        self._hooks += [x.register_step_post_hook(self._after) for x in self.optimizers]
        guard(self)

    # --------------------------------------------- hooks; numbers refer to the list at the beginning of this file

    @torch.compiler.disable  # if optimizer.step is compiled: it counts steps, and each number would be traced again
    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        args, kwargs = with_evaluated_closure(optimizer, args, kwargs)
        self._project_gradients(optimizer)
        return args, kwargs

    def _project_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        if self._stacks.is_repeated():
            return
        self._outermost = None
        if is_skipped(optimizer):
            return
        reshard(self._model)
        fit = self._stacks.still_fit(self.step_count)
        if not fit or self._tree.has_changed():
            check_layers(self._model, self.layers)
            self._tree = ModuleTree(self._model)
        if not self.step_count and self.drift_check_interval and several_processes():
            self.schedule.start_from_first_process()  # DDP may have distributed its weights since κ_0 was measured
        if not fit:
            self.settle()
            self._stacks.regroup(self.step_count)
        if self._stacks.keep_values():  # 1
            self._report()  # the stacks will be made again
            self._stacks.start_anew(self.step_count)
        self._stacks.project_gradients(self.metric_scaling)  # 2 to 4
        self._outermost = optimizer

    @torch.compiler.disable
    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if optimizer is not self._outermost:
            return
        if not self._stacks.stepping:  # the step of a subclass around that of its parent, which ran the hooks, too
            self.settle()
            return
        self.step_count += 1
        if self.step_count % self.projection_interval == 0:
            self._stacks.project(self.step_count)  # 5 to 7
        else:
            self._stacks.hold_update(self.step_count)  # 5 without the projection of Δ
        if not self._stacks.run_ahead():
            self._report()
        if several_processes() and is_due(self.step_count, self.drift_check_interval):
            bounds = {f"the bound of {name}": bound for name, bound in self.bounds().items()}
            check_replicas(factors_of(self.layers), bounds, step=self.step_count)

    @property
    def is_stepping(self) -> bool:
        """Whether a step of the optimizer is on, or has failed."""
        return self._stacks.stepping

    def bounds(self) -> dict[str, float]:
        """{layer: 1 + τ(t)} with t = `step_count`: what κ(S) obeys when projected after at least one step."""
        return self.schedule.bounds(self.step_count)

    @torch.no_grad()
    def settle(self) -> None:
        """Project what has moved since the last projection, so that the constraint holds; otherwise do nothing.

        With `projection_interval` k > 1 the steps in between move U in the flat chart Δ ↦ U₀ + Δ, and each projects its
        gradient at U₀. W jumps by the part of Δ outside of the tangent space, which grows with k and the learning rate.

        Steps call it where `step_count` is a multiple of k, and where other factors have gradients than before. All
        processes must call it at the same step; for k > 1 each call changes the training. Between projections a
        layer's `bound` is inf, also in a checkpoint.

        Raises:
            ConditioningError: A core would vanish; it goes back to its value at the last projection.
        """
        reshard(self._model)
        if self._stacks.interrupted or self._stacks.written():
            self._stacks.restore(self.step_count)
        elif self._stacks.unsettled:
            self._stacks.keep_values()
            self._stacks.project(self.step_count)
        self._report()

    @torch.no_grad()
    def check(self) -> None:
        """Warn, once, of factors that kept their values because a gradient or an update was not finite or too large.

        On a CPU every step ends with it. A GPU would have to be waited for: there the flags of a step stay on the
        device until `check`, `settle`, `state_dict` or `remove` is called, and the Trainer does where it logs.

        Warn, too, of factors that other code wrote after the last step: no bound is in force there until the next one.

        Raises:
            ConditioningError: An update would have made a core zero. The core has its last conditioned value.
        """
        self._report()
        written = self._stacks.names_written()
        for name in written:
            self.layers[name.rpartition(".")[0]].bound = math.inf
        if written:
            logger.warning(
                "%s were written after step %d: no bound is in force there until the next step, or settle() is called",
                listed(written),
                self.step_count,
            )

    def names_written(self) -> list[str]:
        """The factors, "layer.U", that other code wrote since the last step or attaching, as checksums of them tell."""
        return self._stacks.names_written() + self._stacks.names_written_before_first()

    def _report(self) -> None:  # what every step on a CPU ends with
        held, vanished = self._stacks.held(), self._stacks.vanished()
        if held:
            factors = factors_of(self.layers)
            for optimizer in self.optimizers:
                clear_non_finite_state(optimizer, [factors[name] for name in held])
        if held and not self._warned:
            self._warned = True
            message = "gradients or updates that are not finite, or far too large, at step %d: %s kept their values. "
            remedy = "This warning comes once; lower the learning rate if the loss does not recover."
            logger.warning(message + remedy, min(held.values()), listed(list(held)))
        require(
            not vanished,
            "a core S must not vanish: it would have no condition number",
            received=f"no finite scale after step {min(vanished.values(), default=0)} in {listed(list(vanished))}",
            remedy="Lower the weight decay or the learning rate of S. Its last conditioned value is back in place.",
            error=ConditioningError,
        )

    def state_dict(self) -> dict[str, Any]:
        """The state of the schedule, in plain numbers: the step count, T_w and each layer's κ_0.

        Raises:
            OptimizerError: The model is not settled; a training resumed from here would not be the same.
        """
        require(
            not self._stacks.unsettled,
            "the state must be saved where the constraint holds",
            received=f"step {self.step_count}, between two projections",
            remedy="Call settle() first, on every process, and then save model, optimizer and this.",
            error=OptimizerError,
        )
        self.check()
        return {"step_count": self.step_count, **self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the state of `state_dict`. Load the weights first.

        Raises:
            OptimizerError: The state is not one of a manifold step, is of other layers, or is out of range.
        """
        self.schedule.load_state_dict(state)
        self.step_count = state["step_count"]
        reshard(self._model)
        self._stacks.reset(self.step_count)
        orthonormalize_bases(self.layers)
        self._stacks.remember_first()
        if self.step_count:
            self._stacks.publish_bounds(self.step_count)
            for layer in self.layers.values():  # the weights may be from another step
                if not obeys_bound(kappa_of(layer), layer.bound):
                    layer.bound = math.inf

    def remove(self) -> None:
        """Settle the model and detach from the optimizer: from now on nothing keeps the constraint."""
        self.settle()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        forget(self)
