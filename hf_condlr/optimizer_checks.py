"""What the manifold step demands of an optimizer and of the factors, so that no guarantee breaks silently."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hf_condlr.errors import OptimizerError
from hf_condlr.layers import LowRankLayer
from hf_condlr.linalg import condition_number


def check_count(name: str, value: int, least: int, remedy: str) -> None:
    """An integer ≥ `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptimizerError(f"{name} must be an integer ≥ {least}", received=repr(value), remedy=remedy)


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
        [name for name, p in factors.items() if p.requires_grad and id(p) not in held],
        "the optimizer must hold every trainable factor",
        "Make the optimizer after the conversion, from model.parameters(); one optimizer for all factors.",
    )
    check_dtypes(factors)
    refuse(
        [type(optimizer).__name__] if callable(getattr(optimizer, "eval", None)) else [],
        "an optimizer must not swap parameters for evaluation, as schedule-free ones do: they would be unconstrained",
        "Use AdamW, SGD or another one that steps the parameters themselves.",
    )
    refuse(
        [name for name, p in factors.items() if isinstance(p, DTensor)],
        "factors must not be sharded",
        "Use DDP, which keeps whole parameters on each device.",
    )
    frozen = {name: layer for name, layer in layers.items() if not layer.S.requires_grad}
    kappa = {name: condition_number(layer.S.detach()).item() for name, layer in frozen.items()}
    refuse(
        [
            f"{name}.S (κ = {kappa[name]:.4g}, bound {1 + layer.tau:.4g})"
            for name, layer in frozen.items()
            if not kappa[name] <= (1 + layer.tau) * (1 + 1e-4)
        ],
        "a frozen S must obey its bound already",
        "Train S (requires_grad_(True)), or raise tau for these layers with tau_pattern.",
    )


def check_dtypes(factors: dict[str, nn.Parameter]) -> None:
    """Refuse factors in half precision."""
    refuse(
        [f"{name} ({p.dtype})" for name, p in factors.items() if p.dtype not in (torch.float32, torch.float64)],
        "factors must be float32 or float64: rounding to half precision alone breaks orthonormality",
        "Call model.float() and train under autocast (bf16=True or fp16=True in TrainingArguments).",
    )


def refuse(names: list[str], rule: str, remedy: str) -> None:
    """Raise where there are `names`, which break `rule`."""
    if names:
        raise OptimizerError(rule, received=shown(names), remedy=remedy)


def shown(names: list[str]) -> str:
    """The first five, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
