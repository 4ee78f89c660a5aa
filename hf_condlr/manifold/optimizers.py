"""What the manifold step demands of an optimizer and of the factors, so that no guarantee breaks silently."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hf_condlr.distributed.rows import local, rows_of, whole
from hf_condlr.errors import OptimizerError
from hf_condlr.layers import LowRankLayer
from hf_condlr.linalg import condition_number, obeys_bound


@torch.no_grad()
def forget_broken_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Set entries of their state that are NaN or inf to 0: a moment that begins anew. Others stay as they are.

    Gradients that are not finite never reach the optimizer; but its own arithmetic can overflow, as Adafactor's does
    when it divides gradients that span 30 decades by factored second moments.
    """
    for p in parameters:
        for value in optimizer.state.get(p, {}).values():
            if isinstance(value, Tensor) and value.is_floating_point():
                local(value).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def check_count(name: str, value: int, least: int, remedy: str) -> None:
    """An integer ≥ `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptimizerError(f"{name} must be an integer ≥ {least}", received=repr(value), remedy=remedy)


def check_wrappers(optimizer: object, model: nn.Module) -> None:
    """Refuse engines that flatten parameters, whose matrices no step can find any more."""
    refuse(
        [type(x).__name__ for x in model.modules() if isinstance(x, FullyShardedDataParallel)][:1],
        "factors must be matrices, and FSDP1 flattens them",
        "Use FSDP2 (torch.distributed.fsdp.fully_shard, or accelerate with fsdp_version: 2), which shards by rows.",
    )
    found = [x for x in (optimizer, getattr(optimizer, "optimizer", None), model) if _is_deepspeed(x)]
    if any(hasattr(p, "ds_id") for p in model.parameters()):  # ZeRO-3 leaves empty ones
        found.append(model)
    refuse(
        [type(x).__name__ for x in found[:1]],
        "factors must be matrices, and DeepSpeed's ZeRO steps flattened partitions of them",
        "Use FSDP2 (torch.distributed.fsdp.fully_shard, or accelerate with fsdp_version: 2), which shards by rows, "
        "or DDP.",
    )


def _is_deepspeed(x: object) -> bool:
    return any(cls.__module__.partition(".")[0] == "deepspeed" for cls in type(x).__mro__)


def check_optimizer(optimizer: torch.optim.Optimizer, layers: dict[str, LowRankLayer]) -> None:
    """Refuse what would silently break the guarantee."""
    if not layers:
        raise OptimizerError(
            "the model must have factored layers",
            received="none",
            remedy="Call get_robust_lowrank_model(model, config) first.",
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    factors = {f"{name}.{k}": getattr(layer, k) for name, layer in layers.items() for k in "USV"}
    refuse(
        [f"{name} of {p.ndim} dimensions" for name, p in factors.items() if p.ndim != 2],
        "factors must be matrices, which a wrapper has flattened",
        "Use DDP or FSDP2 (torch.distributed.fsdp.fully_shard), which keep their shapes.",
    )
    refuse(
        [name for name, p in factors.items() if p.requires_grad and id(p) not in held],
        "the optimizer must hold every trainable factor",
        "Make the optimizer after the conversion, and after fully_shard, from model.parameters(); one for all factors.",
    )
    check_dtypes(factors)
    for p in factors.values():
        rows_of(p)
    refuse(
        [type(optimizer).__name__] if callable(getattr(optimizer, "eval", None)) else [],
        "an optimizer must not swap parameters for evaluation, as schedule-free ones do: they would be unconstrained",
        "Use AdamW, SGD or another one that steps the parameters themselves.",
    )
    refuse(
        [type(optimizer).__name__] if callable(getattr(optimizer, "fused_backward", None)) else [],
        "an optimizer must move parameters in step(), not while gradients are made, as LOMO does",
        "Use AdamW or Adafactor; FSDP2 and 8-bit optimizers save memory too.",
    )
    frozen = {name: layer for name, layer in layers.items() if not layer.S.requires_grad}
    kappa = {name: condition_number(whole(layer.S)).item() for name, layer in frozen.items()}
    refuse(
        [
            f"{name}.S (κ = {kappa[name]:.4g}, bound {1 + layer.tau:.4g})"
            for name, layer in frozen.items()
            if not obeys_bound(kappa[name], 1 + layer.tau)
        ],
        "a frozen S must obey its bound already",
        "Train S (requires_grad_(True)), or raise tau for these layers with tau_pattern.",
    )


def check_dtypes(factors: dict[str, nn.Parameter]) -> None:
    """Refuse factors in half precision."""
    refuse(
        [f"{name} ({p.dtype})" for name, p in factors.items() if p.dtype not in (torch.float32, torch.float64)],
        "factors must be float32 or float64: rounding to half precision alone breaks orthonormality",
        "Call float() of the model, or of each factored layer alone, and train under autocast (bf16=True or fp16=True "
        "in TrainingArguments): the factors are their own float32 masters.",
    )


def refuse(names: list[str], rule: str, remedy: str) -> None:
    """Raise where there are `names`, which break `rule`."""
    if names:
        raise OptimizerError(rule, received=shown(names), remedy=remedy)


def shown(names: list[str]) -> str:
    """The first five, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
