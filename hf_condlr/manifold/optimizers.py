"""What the manifold step requires of an optimizer and of the factors, so that no guarantee breaks silently."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hf_condlr.distributed.shards import full_tensor, local, rows_of
from hf_condlr.errors import OptimizerError, listed, require
from hf_condlr.layers import LowRankLayer
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


def check_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse `optimizer.step(closure)`. torch's hooks get the whole argument tuple, the optimizer itself first."""
    require(
        all(argument is None for argument in (*args[1:], kwargs.get("closure"))),
        "optimizer.step must be called without a closure: it makes gradients after they could be projected",
        received="a closure",
        remedy="Call backward() first and then step(); LBFGS cannot be used.",
        error=OptimizerError,
    )


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


def check_optimizer(optimizer: torch.optim.Optimizer, layers: dict[str, LowRankLayer]) -> None:
    """Refuse an optimizer, or factors, with which the guarantee would silently break."""
    require(
        layers,
        "the model must have factored layers",
        received="none",
        remedy="Call get_robust_lowrank_model(model, config) first.",
        error=OptimizerError,
    )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
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
    check_dtypes(layers)
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


def check_dtypes(layers: dict[str, LowRankLayer]) -> None:
    """Refuse factors in half precision."""
    wide = (torch.float32, torch.float64)
    _require_none(
        [f"{name} ({p.dtype})" for name, p in factors_of(layers).items() if p.dtype not in wide],
        "factors must be float32 or float64: rounding to half precision alone breaks orthonormality",
        "Call float() of the model, or of each factored layer alone, and train under autocast (bf16=True or fp16=True "
        "in TrainingArguments): the factors are their own float32 masters.",
    )


def check_attached(optimizer: torch.optim.Optimizer, layers: dict[str, LowRankLayer], handle: type[Any]) -> None:
    """Refuse layers to which a handle of this class is attached already."""
    others: list[Any] = [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_post_hooks.values()]
    attached = {id(x) for other in others if isinstance(other, handle) for x in other.layers.values()}
    _require_none(
        [name for name, layer in layers.items() if id(layer) in attached],
        "attach_manifold_step must be called once for an optimizer and model",
        "Keep the handle of the first call, or remove() it before.",
    )


def _is_deepspeed(x: object) -> bool:
    return any(cls.__module__.partition(".")[0] == "deepspeed" for cls in type(x).__mro__)


def _require_none(found: list[str], rule: str, remedy: str) -> None:
    """Raise OptimizerError that lists what was found to break `rule`."""
    require(not found, rule, received=listed(found), remedy=remedy, error=OptimizerError)
