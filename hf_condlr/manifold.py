"""The manifold step: two hooks that keep U, V orthonormal and κ(S) ≤ 1 + τ under any Euclidean optimizer.

Riemannian gradient flow on the factors, U̇ = −(I−UUᵀ) G_U (SSᵀ)⁻¹, V̇ = −(I−VVᵀ) G_V (SᵀS)⁻¹, Ṡ = −G_S (arXiv
2306.01485). κ(S) ≤ 1 + τ makes (SSᵀ)⁻¹ ≈ c⁻² I, c² = ‖S‖_F²/r, so that an ordinary optimizer can integrate it: before
its step gradients are projected on the tangent space, after it the displacement is, and the factors are retracted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import extract_model_from_parallel
from torch import nn
from torch.distributed.tensor import DTensor

from hf_condlr.errors import ConditioningError, OptimizerError
from hf_condlr.layers import LowRankLayer, factored_layers
from hf_condlr.linalg import condition_number, orthonormality_error, orthonormalize
from hf_condlr.stacks import BasisStack, CoreStack, basis_stacks, core_stacks

logger = logging.getLogger(__name__)
MAX_INITIAL_CONDITION = 1e4  # a warm-up starts at κ_0 clipped to [1 + τ, this]


def attach_manifold_step(
    optimizer: Any,
    model: nn.Module,
    *,
    warmup_steps: int = 0,
    metric_scaling: bool | None = None,
) -> ManifoldStep:
    """Keep the constraint of every factored layer of `model` under `optimizer`, from its next step on. Call it once.

    Nothing else changes in a training loop: `loss.backward(); optimizer.step(); optimizer.zero_grad()`, under plain
    torch or accelerate, before or after `accelerator.prepare`. Gradient clipping sees the gradients as backward left
    them, before the projection. Bases that are not orthonormal yet are made so, and W stays what it is. A copy or a
    pickle of the optimizer has lost the step, as torch drops its hooks: attach again.

    Args:
        optimizer: Any `torch.optim.Optimizer` that holds the trainable factors, or accelerate's wrapper of it.
        model: A model with `LowRankLinear` or `LowRankConv2d` layers, wrapped by DDP or not.
        warmup_steps: T_w. The bound falls geometrically from each layer's own κ_0 to 1 + τ in so many steps:
            1 + τ(t) = κ_0^{1−p} (1+τ)^p with p = min(1, t/T_w). With 0 the first step conditions at once.
        metric_scaling: Divide the gradients of U and V by c² = ‖S‖_F²/r, as the flow does. None: on for SGD, off for
            others, which rescale gradients themselves.

    Returns:
        A handle: `step_count`, `bounds()`, `state_dict()`, `load_state_dict()`, `remove()`.

    Raises:
        OptimizerError: The guarantee cannot be kept: factors missing from the optimizer, in half precision, sharded,
            attached already, a frozen S that is worse conditioned than its bound, or a schedule-free optimizer.
    """
    return ManifoldStep(optimizer, model, warmup_steps=warmup_steps, metric_scaling=metric_scaling)


class ManifoldStep:
    """The handle of `attach_manifold_step`."""

    def __init__(
        self, optimizer: Any, model: nn.Module, *, warmup_steps: int = 0, metric_scaling: bool | None = None
    ) -> None:
        if not isinstance(warmup_steps, int) or warmup_steps < 0:
            raise OptimizerError(
                "warmup_steps must be an integer ≥ 0", received=repr(warmup_steps), remedy="0 conditions at once."
            )
        # Only accelerate's wrapper: others (Lookahead, ...) move the factors after the optimizer inside them.
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        self.optimizer: torch.optim.Optimizer = inner
        unwrapped = extract_model_from_parallel(model, keep_torch_compile=False)
        self.layers = factored_layers(unwrapped)
        self.warmup_steps = warmup_steps
        self.metric_scaling = isinstance(self.optimizer, torch.optim.SGD) if metric_scaling is None else metric_scaling
        self.step_count = 0
        _check(self.optimizer, self.layers)
        self._orthonormalize()
        self.initial_condition = {
            name: min(max(condition_number(layer.S.detach()).item(), 1 + layer.tau), MAX_INITIAL_CONDITION)
            for name, layer in self.layers.items()
        }
        self._bases: list[BasisStack] = []
        self._cores: list[CoreStack] = []
        self._skipped = False
        self._warned = False
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]

    # -------------------------------------------------------------------------------------------------- handle

    def remove(self) -> None:
        """Detach from the optimizer: from now on nothing keeps the constraint."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def bounds(self) -> dict[str, float]:
        """{layer: 1 + τ(t)}, what κ(S) obeys after step t = `step_count`; after at least one step."""
        return {name: self._bound(name, layer) for name, layer in self.layers.items()}

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands: the step count, T_w and each layer's κ_0; plain numbers."""
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
        self._orthonormalize()  # weights may have been loaded too
        if self.step_count:
            self._publish_bounds()

    @torch.no_grad()
    def _orthonormalize(self) -> None:
        """Bases that are not orthonormal (rounded to bfloat16 once, say) become so; W stays: S takes what they lose."""
        for layer in self.layers.values():
            limit = 1e-5 * math.sqrt(layer.r)
            if max(orthonormality_error(layer.U).item(), orthonormality_error(layer.V).item()) > limit:
                wide = (p.detach().double() for p in (layer.U, layer.S, layer.V))
                layer.set_factors(*orthonormalize(*wide))

    def _bound(self, name: str, layer: LowRankLayer) -> float:
        """κ_0^{1−p} (1+τ)^p with p = min(1, t/T_w)."""
        if math.isinf(layer.tau):
            return math.inf
        progress = min(1.0, self.step_count / self.warmup_steps) if self.warmup_steps else 1.0
        return self.initial_condition[name] ** (1 - progress) * (1 + layer.tau) ** progress

    def _publish_bounds(self) -> None:
        for name, layer in self.layers.items():
            layer.bound = self._bound(name, layer)

    # --------------------------------------------------------------------------------------------------- hooks

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
        self._skipped = found_inf is not None and bool(found_inf.item())
        if self._skipped:
            return
        _check_dtypes({f"{name}.{k}": getattr(layer, k) for name, layer in self.layers.items() for k in "USV"})
        with _full_precision():
            # While bounds still tighten, a core that was frozen in the meantime has to follow.
            warming_up = self.step_count <= self.warmup_steps
            self._bases, self._cores = basis_stacks(self.layers), core_stacks(self.layers, all_cores=warming_up)
            for bases in self._bases:
                bases.project_gradients(self.metric_scaling)
            for cores in self._cores:
                cores.sanitize_gradients()

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self._skipped:
            return
        stacks = [*self._bases, *self._cores]
        with _full_precision():
            self.step_count += 1
            for bases in self._bases:
                bases.retract_update()
            for cores in self._cores:
                cores.condition_update([self._bound(name, self.layers[name]) for name in cores.layers])
        self._publish_bounds()
        self._bases, self._cores = [], []
        if vanished := [name for stack in stacks if isinstance(stack, CoreStack) for name in stack.vanished]:
            raise ConditioningError(
                "a core S must not vanish: it would have no condition number",
                received=f"no finite scale after step {self.step_count} in {_shown(vanished)}",
                remedy="Lower the weight decay or the learning rate of S. Its value before the step is back in place.",
            )
        held = [name for stack in stacks for name in stack.held()]
        if held and not self._warned:
            self._warned = True
            logger.warning(
                "gradients or updates that are not finite at step %d: %s kept their values. Said once; lower the "
                "learning rate if the loss does not recover.",
                self.step_count,
                _shown(held),
            )


# ------------------------------------------------------------------------------------------------------ checks


def _check(optimizer: torch.optim.Optimizer, layers: dict[str, LowRankLayer]) -> None:
    """Refuse what would silently break the guarantee."""
    if not layers:
        raise OptimizerError(
            "the model must have factored layers",
            received="none",
            remedy="Call get_robust_lowrank_model(model, config) first.",
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    factors = {f"{name}.{k}": getattr(layer, k) for name, layer in layers.items() for k in "USV"}
    _refuse(
        [name for name, p in factors.items() if p.requires_grad and id(p) not in held],
        "the optimizer must hold every trainable factor",
        "Make the optimizer after the conversion, from model.parameters(); one optimizer for all factors.",
    )
    _check_dtypes(factors)
    _refuse(
        [type(optimizer).__name__] if callable(getattr(optimizer, "eval", None)) else [],
        "an optimizer must not swap parameters for evaluation, as schedule-free ones do: they would be unconstrained",
        "Use AdamW, SGD or another one that steps the parameters themselves.",
    )
    _refuse(
        [name for name, p in factors.items() if isinstance(p, DTensor)],
        "factors must not be sharded",
        "Use DDP, which keeps whole parameters on each device.",
    )
    frozen = {name: layer for name, layer in layers.items() if not layer.S.requires_grad}
    kappa = {name: condition_number(layer.S.detach()).item() for name, layer in frozen.items()}
    _refuse(
        [
            f"{name}.S (κ = {kappa[name]:.4g}, bound {1 + layer.tau:.4g})"
            for name, layer in frozen.items()
            if not kappa[name] <= (1 + layer.tau) * (1 + 1e-4)
        ],
        "a frozen S must obey its bound already",
        "Train S (requires_grad_(True)), or raise tau for these layers with tau_pattern.",
    )
    others = (getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_post_hooks.values())
    attached = {id(x) for step in others if isinstance(step, ManifoldStep) for x in step.layers.values()}
    _refuse(
        [name for name, layer in layers.items() if id(layer) in attached],
        "attach_manifold_step must be called once for an optimizer and model",
        "Keep the handle of the first call, or remove() it before.",
    )


def _check_dtypes(factors: dict[str, nn.Parameter]) -> None:
    _refuse(
        [f"{name} ({p.dtype})" for name, p in factors.items() if p.dtype not in (torch.float32, torch.float64)],
        "factors must be float32 or float64: rounding to half precision alone breaks orthonormality",
        "Call model.float() and train under autocast (bf16=True or fp16=True in TrainingArguments).",
    )


def _refuse(names: list[str], rule: str, remedy: str) -> None:
    if names:
        raise OptimizerError(rule, received=_shown(names), remedy=remedy)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


# --------------------------------------------------------------------------------------------------- precision


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products in true float32, whatever autocast or TF32 settings hold outside: half of it breaks the guarantee."""
    backends = [b for b in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)) if b]
    settings: list[tuple[Any, str, Any]] = [
        (b, "fp32_precision", "ieee") for b in backends if hasattr(b, "fp32_precision")
    ]
    settings = settings or [(torch.backends.cuda.matmul, "allow_tf32", False)]  # torch < 2.9
    previous = [getattr(b, name) for b, name, _ in settings]
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        for backend, name, value in settings:
            setattr(backend, name, value)
        try:
            yield
        finally:
            for (backend, name, _), value in zip(settings, previous, strict=True):
                setattr(backend, name, value)
