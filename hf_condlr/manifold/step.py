"""The manifold step: two hooks that keep U, V orthonormal and κ(S) ≤ 1 + τ under any Euclidean optimizer.

Riemannian gradient flow on the factors, U̇ = −(I−UUᵀ) G_U (SSᵀ)⁻¹, V̇ = −(I−VVᵀ) G_V (SᵀS)⁻¹, Ṡ = −G_S (arXiv
2306.01485). κ(S) ≤ 1 + τ makes (SSᵀ)⁻¹ ≈ c⁻² I, c² = ‖S‖_F²/r, so that an ordinary optimizer can integrate it: before
its step gradients are projected on the tangent space, after it the displacement is, and the factors are retracted.
"""

from __future__ import annotations

import logging
import math
from itertools import chain
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import extract_model_from_parallel
from torch import nn

from hf_condlr.distributed.collectives import Work, run
from hf_condlr.distributed.linalg import orthonormality_error, orthonormalize
from hf_condlr.distributed.replicas import check_replicas, is_due, is_replicated, of_first_process
from hf_condlr.distributed.rows import reshard, whole, write, write_whole
from hf_condlr.errors import ConditioningError, OptimizerError
from hf_condlr.layers import LowRankLayer, factored_layers
from hf_condlr.linalg import condition_number, full_precision, obeys_bound
from hf_condlr.manifold import masks
from hf_condlr.manifold.bases import BasisStack
from hf_condlr.manifold.change_detection import Watch
from hf_condlr.manifold.cores import CoreStack
from hf_condlr.manifold.grouping import basis_stacks, core_stacks, moving_factors
from hf_condlr.manifold.optimizers import (
    check_count,
    check_dtypes,
    check_optimizer,
    check_wrappers,
    forget_broken_moments,
    refuse,
    shown,
)

logger = logging.getLogger(__name__)


MAX_INITIAL_CONDITION = 1e4  # a warm-up starts at κ_0 clipped to [1 + τ, this]


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
    them, before the projection. Bases that are not orthonormal yet are made so, and W stays what it is. A copy or a
    pickle of the optimizer has lost the step, as torch drops its hooks: attach again.

    Args:
        optimizer: Any `torch.optim.Optimizer` that holds the trainable factors, or accelerate's wrapper of it.
        model: A model with `LowRankLinear` or `LowRankConv2d` layers, wrapped by DDP, sharded by `fully_shard`, or
            neither. Of a sharded one every process must do the same: attach, step, `settle()`, `load_state_dict()`.
        warmup_steps: T_w. The bound falls geometrically from each layer's own κ_0 to 1 + τ in so many steps:
            1 + τ(t) = κ_0^{1−p} (1+τ)^p with p = min(1, t/T_w). With 0 the first step conditions at once.
        metric_scaling: Divide the gradients of U and V by c² = ‖S‖_F²/r, as the flow does. None: on for SGD, off for
            others, which rescale gradients themselves.
        projection_interval: k. Retract and condition after every k-th step only, which is most of the cost. In between
            the constraint does **not** hold: call `settle()` of the handle, on every process, before you evaluate,
            save or load weights, and at the end. See `ManifoldStep.settle`.
        drift_check_interval: Of several processes that hold copies of the factors, compare them after the first step
            and after every so many, bit for bit. The same on every process. 0 never: for processes that train models
            of their own, whose warm-up then starts from their own κ_0 instead of process 0's.

    Returns:
        A handle: `step_count`, `bounds()`, `settle()`, `check()`, `state_dict()`, `load_state_dict()`, `remove()`.

    Raises:
        OptimizerError: The guarantee cannot be kept: factors missing from the optimizer, in half precision, flattened
            or sharded otherwise than by rows, attached already, a frozen S that is worse conditioned than its bound,
            or a schedule-free optimizer.
    """
    return ManifoldStep(
        optimizer,
        model,
        warmup_steps=warmup_steps,
        metric_scaling=metric_scaling,
        projection_interval=projection_interval,
        drift_check_interval=drift_check_interval,
    )


class ManifoldStep:
    """The handle of `attach_manifold_step`."""

    def __init__(
        self,
        optimizer: Any,
        model: nn.Module,
        *,
        warmup_steps: int = 0,
        metric_scaling: bool | None = None,
        projection_interval: int = 1,
        drift_check_interval: int = 100,
        ) -> None:
        check_count("warmup_steps", warmup_steps, 0, "0 conditions at once.")
        check_count("projection_interval", projection_interval, 1, "1 projects after every step.")
        check_count("drift_check_interval", drift_check_interval, 0, "0 never compares.")
        # Only accelerate's wrapper: others (Lookahead, ...) move the factors after the optimizer inside them.
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        self.optimizer: torch.optim.Optimizer = inner
        check_wrappers(optimizer, model)
        self._model = extract_model_from_parallel(model, keep_torch_compile=False)
        reshard(self._model)
        self.layers = factored_layers(self._model)
        self.warmup_steps = warmup_steps
        self.metric_scaling = isinstance(self.optimizer, torch.optim.SGD) if metric_scaling is None else metric_scaling
        self.projection_interval = projection_interval
        self.drift_check_interval = drift_check_interval
        self.step_count = 0
        check_optimizer(self.optimizer, self.layers)
        _check_attached(self.optimizer, self.layers)
        self._orthonormalize()
        self.initial_condition = {
            name: min(max(_condition_number(layer), 1 + layer.tau), MAX_INITIAL_CONDITION)
            for name, layer in self.layers.items()
        }
        self._watch = Watch(self.layers)
        self._forget_stacks()
        self._skipped = False
        self._warned = False
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]

    # -------------------------------------------------------------------------------------------------- handle

    def remove(self) -> None:
        """Detach from the optimizer: the model is settled, and from now on nothing keeps the constraint."""
        self.settle()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def bounds(self) -> dict[str, float]:
        """{layer: 1 + τ(t)}, what κ(S) obeys when projected after step t = `step_count`; after at least one step."""
        return {name: self._bound(name, layer) for name, layer in self.layers.items()}

    @torch.no_grad()
    def settle(self) -> None:
        """Bring back what has moved since the last projection, so that the constraint holds; else do nothing.

        With `projection_interval` k > 1 and U₀ the basis at the last projection, the steps in between move U in the
        flat chart Δ ↦ U₀ + Δ. Its gradient is (I − U₀U₀ᵀ)∇L(U₀ + Δ): each step projects at U₀, which is orthonormal,
        and not at the present U, at which I − UUᵀ would be no projection. What momentum and adaptive scaling add
        outside of the tangent space goes with the accumulated Δ ← (I − U₀U₀ᵀ)Δ, and U ← R(U₀ + Δ); S is conditioned
        to the bound of the present step. W jumps by what is dropped, which grows with k and the learning rate.

        It happens by itself where `step_count` is a multiple of k, and before a step in which other factors have
        gradients than in the last one. All processes must call it at the same step. How often it is called changes the
        training, for k > 1. Between the projections a layer's `bound` is inf, and so it is in a checkpoint that
        `save_pretrained` writes there.

        Raises:
            ConditioningError: A core would vanish; it goes back to its value at the last projection.
        """
        if self._unsettled:
            reshard(self._model)
            for stack in self._stacks:
                stack.begin_step()
            self._project()
        self.check()

    def check(self) -> None:
        """Say, once, which factors kept their values because a gradient or an update was not finite or too large.

        On a CPU every step ends with it. A GPU would have to be waited for: there the flags of a step stay on the
        device until `check`, `settle`, `state_dict` or `remove` is called, and the Trainer does where it logs.

        Raises:
            ConditioningError: An update would have made a core zero. The core has its last conditioned value.
        """
        stacks = self._stacks
        held = {name: step for stack in stacks for name, step in stack.held().items()}
        vanished = {name: step for stack in self._cores for name, step in stack.vanished().items()}
        if held:
            factors = {name: p for stack in stacks for name, p in zip(stack.names, stack.parameters, strict=True)}
            forget_broken_moments(self.optimizer, [factors[name] for name in held])
        if held and not self._warned:
            self._warned = True
            logger.warning(
                "gradients or updates that are not finite, or far too large, at step %d: %s kept their values. Said "
                "once; lower the learning rate if the loss does not recover.",
                min(held.values()),
                shown(list(held)),
            )
        if vanished:
            raise ConditioningError(
                "a core S must not vanish: it would have no condition number",
                received=f"no finite scale after step {min(vanished.values())} in {shown(list(vanished))}",
                remedy="Lower the weight decay or the learning rate of S. Its last conditioned value is back in place.",
            )

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands: the step count, T_w and each layer's κ_0; plain numbers.

        Raises:
            OptimizerError: The model is not settled, so that going on from here would not be the same training.
        """
        if self._unsettled:
            raise OptimizerError(
                "the state must be saved where the constraint holds",
                received=f"step {self.step_count}, between two projections",
                remedy="Call settle() first, on every process, and then save model, optimizer and this.",
            )
        self.check()
        return {
            "step_count": self.step_count,
            "warmup_steps": self.warmup_steps,
            "initial_condition": dict(self.initial_condition),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            OptimizerError: The state belongs to other layers.
        """
        missing = sorted(set(self.layers) ^ set(state["initial_condition"]))
        if missing:
            raise OptimizerError(
                "the state must name the layers of this model",
                received=f"a difference in {', '.join(missing[:5])}",
                remedy="Convert the model with the config that the state was saved with.",
            )
        self.step_count = int(state["step_count"])
        self.warmup_steps = int(state["warmup_steps"])
        self.initial_condition = {name: float(value) for name, value in state["initial_condition"].items()}
        reshard(self._model)
        self._forget_stacks()  # of the training that is left
        self._orthonormalize()  # weights may have been loaded too
        self._watch.distrust()
        if self.step_count:
            self._publish_bounds()
            for layer in self.layers.values():  # the weights may be of another moment
                if not obeys_bound(_condition_number(layer), layer.bound):
                    layer.bound = math.inf

    @torch.no_grad()
    def _orthonormalize(self) -> None:
        """Bases that are not orthonormal (rounded to bfloat16 once, say) become so; W stays: S takes what they lose."""
        for name, layer in self.layers.items():
            limit = 1e-5 * math.sqrt(layer.r)
            errors = orthonormality_error(layer.U).item(), orthonormality_error(layer.V).item()
            if not (math.isfinite(sum(errors)) and torch.isfinite(whole(layer.S)).all()):
                raise ConditioningError(
                    "factors must be finite",
                    received=f"NaN or inf in {name}",
                    remedy="Load or convert the model again.",
                )
            if max(errors) > limit:
                Q_U, S, Q_V = orthonormalize(layer.U, layer.S, layer.V)
                write(layer.U, Q_U)
                write_whole(layer.S, S)
                write(layer.V, Q_V)
                layer.refresh_bound()

    def _progress(self, step: int) -> float:
        """p = min(1, t/T_w)."""
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0

    def _bound(self, name: str, layer: LowRankLayer) -> float:
        """κ_0^{1−p} (1+τ)^p."""
        if math.isinf(layer.tau):
            return math.inf
        progress = self._progress(self.step_count)
        return self.initial_condition[name] ** (1 - progress) * (1 + layer.tau) ** progress

    def _publish_bounds(self) -> None:
        for name, layer in self.layers.items():
            layer.bound = self._bound(name, layer)

    # --------------------------------------------------------------------------------------------------- hooks

    @torch.compiler.disable  # where optimizer.step is compiled: it counts steps, and each number would be traced anew
    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        # args[0] is the optimizer itself: torch hands over the whole argument tuple of `step`.
        if any(argument is not None for argument in (*args[1:], kwargs.get("closure"))):
            raise OptimizerError(
                "optimizer.step must be called without a closure: it makes gradients after they could be projected",
                received="a closure",
                remedy="Call backward() first and then step(); LBFGS cannot be used.",
            )
        # Fused optimizers run their hooks even when GradScaler found an overflow and their kernel does nothing.
        found_inf = getattr(optimizer, "found_inf", None)
        self._skipped = found_inf is not None and bool(whole(found_inf).item())
        if self._skipped:
            return
        reshard(self._model)
        check_dtypes({f"{name}.{k}": getattr(layer, k) for name, layer in self.layers.items() for k in "USV"})
        copies = is_replicated() and self.drift_check_interval  # else each may train its own model
        if copies and not self.step_count:  # DDP may have handed out its weights since κ_0 was measured
            self.initial_condition = of_first_process(self.initial_condition, next(iter(self.layers.values())).S.device)
        with full_precision():
            self._gather()
            bases = ((x.rows, x.entries, x.project_gradients(self.metric_scaling)) for x in self._bases)
            cores = ((x.rows, x.entries, x.sanitize_gradients()) for x in self._cores)
            run(chain(bases, cores))

    @property
    def _stacks(self) -> list[BasisStack | CoreStack]:
        return [*self._bases, *self._cores]

    def _forget_stacks(self) -> None:
        self._bases: list[BasisStack] = []
        self._cores: list[CoreStack] = []
        self._moving: tuple = ()
        self._unsettled = False  # factors have moved since the last projection
        self._interfered = False  # others had changed factors or tolerances before they moved

    def _gather(self) -> None:
        """Stacks of the factors that this step may move: the same ones as long as the same factors have gradients."""
        if not self._unsettled:
            self._interfered = self._watch.is_written() or self._watch.is_retuned()
            if self._interfered:
                self._orthonormalize()
        # While bounds still tighten, a core that was frozen in the meantime has to follow.
        all_cores = self.step_count <= self.warmup_steps or self._interfered
        moving = moving_factors(self.layers, all_cores=all_cores)
        if moving != self._moving:
            self.settle()
            self._bases = basis_stacks(self.layers)
            self._cores = core_stacks(self.layers, self.initial_condition, all_cores=all_cores)
            self._moving = moving
        for stack in self._stacks:
            if self._unsettled:
                stack.begin_step()
            else:
                stack.begin_interval()
        self._unsettled = True  # from here on: an optimizer that fails half way may have moved factors

    @torch.compiler.disable
    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._skipped:
            return
        self.step_count += 1
        if self.step_count % self.projection_interval == 0:
            self._project()
            self._check_drift()
            return
        run((stack.rows, stack.entries, stack.hold_update()) for stack in self._stacks)
        for stack in self._stacks:
            stack.record(self.step_count)
        for layer in self.layers.values():
            layer.bound = math.inf
        self._check_where_free()
        self._check_drift()

    def _check_drift(self) -> None:
        if is_replicated() and is_due(self.step_count, self.drift_check_interval):
            factors = {f"{name}.{k}": getattr(layer, k) for name, layer in self.layers.items() for k in "USV"}
            bounds = {f"the bound of {name}": bound for name, bound in self.bounds().items()}
            check_replicas(factors, bounds, step=self.step_count)

    def _project(self) -> None:
        """Retract the bases, condition the cores."""
        progress = self._progress(self.step_count)
        previous = self._progress(max(0, self.step_count - self.projection_interval))

        def work_on(stack: BasisStack | CoreStack) -> Work:
            if isinstance(stack, BasisStack):
                return stack.retract_update()
            return stack.condition_update(progress, previous, self.step_count)

        with full_precision():
            run((stack.rows, stack.entries, work_on(stack)) for stack in self._stacks)
        for stack in self._stacks:
            stack.record(self.step_count)
            stack.end_interval()
        moving = [p for stack in self._stacks for p in stack.parameters]
        if self._watch.is_retuned() or self._watch.is_written_beside(moving):
            self._orthonormalize()
            self._condition_all(progress)
        self._watch.remember()
        self._unsettled = False
        self._publish_bounds()
        self._check_where_free()

    def _condition_all(self, progress: float) -> None:
        """Every core: tolerances were changed since the stacks were made, or factors that no stack holds written."""
        stacks = core_stacks(self.layers, self.initial_condition, all_cores=True)
        self._cores = [*self._cores, *stacks]  # what the others noted is still to be told
        self._moving = ()  # the next step makes its own stacks
        for cores in stacks:
            cores.begin_interval()
        with full_precision():
            run((x.rows, x.entries, x.condition_update(progress, progress, self.step_count)) for x in stacks)
        for cores in stacks:
            cores.record(self.step_count)
            cores.end_interval()

    def _check_where_free(self) -> None:
        if not any(masks.runs_ahead(stack.held_at) for stack in self._stacks):
            self.check()


def _condition_number(layer: LowRankLayer) -> float:
    """κ(S), inf for S = 0."""
    kappa = condition_number(whole(layer.S)).item()
    return math.inf if math.isnan(kappa) else kappa


def _check_attached(optimizer: torch.optim.Optimizer, layers: dict[str, LowRankLayer]) -> None:
    others = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_post_hooks.values())
    attached = {id(x) for step in others if isinstance(step, ManifoldStep) for x in step.layers.values()}
    refuse(
        [name for name, layer in layers.items() if id(layer) in attached],
        "attach_manifold_step must be called once for an optimizer and model",
        "Keep the handle of the first call, or remove() it before.",
    )
