"""Requirements of the manifold step on optimizer and factors, so that no guarantee breaks silently."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hf_condlr.distributed.shards import full_tensor, local, rows_of
from hf_condlr.errors import OptimizerError, listed, require
from hf_condlr.layers import LowRankLayer, factored_layers
from hf_condlr.linalg import obeys_bound
from hf_condlr.manifold.schedule import kappa_of


def factors_of(layers: dict[str, LowRankLayer]) -> dict[str, nn.Parameter]:
    """{"layer.U": U, "layer.S": S, "layer.V": V, ...} of all layers."""
    return {f"{name}.{k}": getattr(layer, k) for name, layer in layers.items() for k in "USV"}


@torch.no_grad()
def clear_non_finite_state(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Set NaN and inf in the optimizer's state of these parameters to 0; other entries stay as they are.

    Gradients that are not finite never reach the optimizer, but its own arithmetic can overflow, as Adafactor's does
    when it divides gradients that span 30 decades by factored second moments.
    """
    for p in parameters:
        for value in optimizer.state.get(p, {}).values():
            if isinstance(value, Tensor) and value.is_floating_point():
                local(value).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def is_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether this step moves nothing: GradScaler found an overflow. Fused optimizers run their hooks nevertheless."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(full_tensor(found_inf).item())


class EvaluatedClosure:
    """The closure of a step, called before it so that its gradients can be projected; the step gets its loss.

    Raises:
        OptimizerError: A second call in a step: it would have to compute gradients at another point.
    """

    def __init__(self, closure: Callable[[], Any]) -> None:
        with torch.enable_grad():
            self._loss = closure()
        self._calls = 0

    def __call__(self) -> Any:
        self._calls += 1
        require(
            self._calls == 1,
            "an optimizer must call its closure once in a step, since the gradients are projected before it",
            received="a second call",
            remedy="Call backward() first and then step(), or use another optimizer.",
            error=OptimizerError,
        )
        return self._loss


def with_evaluated_closure(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a step, with its closure called if it has one. The first of them is the optimizer itself.

    Raises:
        OptimizerError: The optimizer is LBFGS, which calls its closure many times.
    """
    inside = "closure" in kwargs
    closure = kwargs["closure"] if inside else args[1] if len(args) > 1 else None
    if closure is None or isinstance(closure, EvaluatedClosure):  # of the optimizer around this one
        return args, kwargs
    rule, remedy = "the optimizer must not be LBFGS, which moves factors between calls of its closure", "Use AdamW."
    is_usable = not isinstance(optimizer, torch.optim.LBFGS)
    require(is_usable, rule, received=type(optimizer).__name__, remedy=remedy, error=OptimizerError)
    evaluated = EvaluatedClosure(closure)
    return (args, kwargs | {"closure": evaluated}) if inside else ((args[0], evaluated, *args[2:]), kwargs)


def with_inner(optimizer: Any) -> list[torch.optim.Optimizer]:
    """An optimizer and those inside it, as SAM has one, which can be stepped instead of it.

    Raises:
        OptimizerError: The optimizer is not one of torch's, or its `step` runs no hooks.
    """
    require(
        isinstance(optimizer, torch.optim.Optimizer) and getattr(type(optimizer).step, "hooked", False),
        "the optimizer must be a torch.optim.Optimizer whose step runs hooks",
        received=type(optimizer).__name__,
        remedy="Pass the optimizer inside it, if nothing else moves the parameters, or call "
        "torch.optim.Optimizer.__init__ in the constructor of its class.",
        error=OptimizerError,
    )
    found = [optimizer]
    for outer in found:  # grows during the loop
        found += [x for x in vars(outer).values() if isinstance(x, torch.optim.Optimizer) and x not in found]
    return found


def check_wrappers(optimizer: object, model: nn.Module) -> None:
    """Refuse engines that flatten parameters: no matrix is left whose constraint could be kept."""
    _require_none(
        [type(x).__name__ for x in model.modules() if isinstance(x, FullyShardedDataParallel)][:1],
        "factors must be matrices, and FSDP1 flattens them",
        "Use FSDP2 (torch.distributed.fsdp.fully_shard, or accelerate with fsdp_version: 2), which shards by rows.",
    )
    found = [x for x in (optimizer, getattr(optimizer, "optimizer", None), model) if _is_deepspeed(x)]
    if any(hasattr(p, "ds_id") for p in model.parameters()):  # ZeRO-3 leaves empty ones
        found.append(model)
    _require_none(
        [type(x).__name__ for x in found[:1]],
        "factors must be matrices, and DeepSpeed's ZeRO steps flattened partitions of them",
        "Use FSDP2 (torch.distributed.fsdp.fully_shard, or accelerate with fsdp_version: 2), which shards by rows, "
        "or DDP.",
    )


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, layers: dict[str, LowRankLayer]) -> None:
    """Refuse an optimizer, or factors, with which the guarantee would silently break."""
    require(
        layers,
        "the model must have factored layers",
        received="none",
        remedy="Call get_robust_lowrank_model(model, config) first.",
        error=OptimizerError,
    )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    check_layers(model, layers)
    factors = factors_of(layers)
    _require_none(
        [f"{name} of {p.ndim} dimensions" for name, p in factors.items() if p.ndim != 2],
        "factors must be matrices, which a wrapper has flattened",
        "Use DDP or FSDP2 (torch.distributed.fsdp.fully_shard), which keep their shapes.",
    )
    _require_none(
        [name for name, p in factors.items() if p.requires_grad and id(p) not in held],
        "the optimizer must hold every trainable factor",
        "Make the optimizer after the conversion, and after fully_shard, from model.parameters(); one for all factors.",
    )
    for p in factors.values():
        rows_of(p)
    _require_none(
        [type(optimizer).__name__] if callable(getattr(optimizer, "eval", None)) else [],
        "an optimizer must not swap parameters for evaluation, as schedule-free ones do: they would be unconstrained",
        "Use AdamW, SGD or another one that steps the parameters themselves.",
    )
    _require_none(
        [type(optimizer).__name__] if callable(getattr(optimizer, "fused_backward", None)) else [],
        "an optimizer must move parameters in step(), not while gradients are made, as LOMO does",
        "Use AdamW or Adafactor; FSDP2 and 8-bit optimizers save memory too.",
    )
    kappa = {name: kappa_of(layer) for name, layer in layers.items() if not layer.S.requires_grad}
    _require_none(
        [
            f"{name}.S (κ = {kappa[name]:.4g}, bound {1 + layers[name].tau:.4g})"
            for name in kappa
            if not obeys_bound(kappa[name], 1 + layers[name].tau)
        ],
        "a frozen S must obey its bound already",
        "Train S (requires_grad_(True)), or raise tau for these layers with tau_pattern.",
    )


def check_layers(model: nn.Module, layers: dict[str, LowRankLayer]) -> None:
    """Refuse layers that are not the model's, and factors that are not separate matrices of full precision."""
    present = factored_layers(model)
    if set(present.values()) != set(layers.values()):
        others = {**{x: name for name, x in layers.items()}, **{x: name for name, x in present.items()}}
        _require_none(
            [others[x] for x in set(present.values()) ^ set(layers.values())],
            "the factored layers must be those to which the step was attached",
            "remove() the handle, make a new optimizer and attach the step to it.",
            received="others: ",
        )
    factors = {f"{name}.{k}": layer._parameters.get(k) for name, layer in layers.items() for k in "USV"}
    _require_none(
        [name for name, p in factors.items() if p is None],
        "factors must be parameters of their layer",
        "Take the parametrization off: torch.nn.utils.parametrize.remove_parametrizations.",
    )
    if len(set(factors.values())) < len(factors):
        values = list(factors.values())
        _require_none(
            [name for i, (name, p) in enumerate(factors.items()) if any(p is q for q in values[:i])],
            "a factor must belong to one layer",
            "Use one layer in both places, or give each layer a copy.",
        )
    wide = (torch.float32, torch.float64)
    _require_none(
        [f"{name} ({p.dtype})" for name, p in factors.items() if p is not None and p.dtype not in wide],
        "factors must be float32 or float64: rounding to half precision alone breaks orthonormality",
        "Call float() of the model, or of each factored layer alone, and train under autocast (bf16=True or fp16=True "
        "in TrainingArguments): the factors are their own float32 masters.",
    )


def check_attached(optimizers: list[torch.optim.Optimizer], layers: dict[str, LowRankLayer], handle: type[Any]) -> None:
    """Refuse layers to which a handle of this class is attached already."""
    others = [owner for optimizer in optimizers for owner in hook_owners(optimizer) if isinstance(owner, handle)]
    attached = {id(x) for other in others for x in other.layers.values()}
    _require_none(
        [name for name, layer in layers.items() if id(layer) in attached],
        "attach_manifold_step must be called once for an optimizer and model",
        "Keep the handle of the first call, or remove() it before.",
    )


def hook_owners(optimizer: torch.optim.Optimizer) -> list[Any]:
    """The objects whose methods are hooks after the optimizer's step."""
    return [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_post_hooks.values()]


def _is_deepspeed(x: object) -> bool:
    return any(cls.__module__.partition(".")[0] == "deepspeed" for cls in type(x).__mro__)


def _require_none(found: list[str], rule: str, remedy: str, received: str = "") -> None:
    """Raise OptimizerError that lists what was found to break `rule`."""
    require(not found, rule, received=received + listed(found), remedy=remedy, error=OptimizerError)
