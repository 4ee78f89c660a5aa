"""An adapter's factors against its τ: when they are loaded, and when they are saved."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_condlr.adapters.layer import adapted_layers
from hf_condlr.checkpoints.rounding import can_be_orthonormal, least_condition_number
from hf_condlr.errors import CheckpointError, listed, require
from hf_condlr.layers import LowRankUpdate
from hf_condlr.linalg import obeys_bound

logger = logging.getLogger(__name__)

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def updates(model: nn.Module, adapter: str) -> dict[str, LowRankUpdate]:
    """{name of the module: update} of one adapter."""
    layers: dict[str, Any] = dict(adapted_layers(model, adapter))
    return {f"{n}.condlr_factors.{adapter}": x.condlr_factors[adapter] for n, x in layers.items()}


def check_adapter(model: nn.Module, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Check all factors before any is loaded: complete, of the model's shapes, finite, and within κ ≤ 1 + τ.

    Args:
        model: The model with the adapter's updates, whose values are not read.
        adapter: The adapter's name.
        tensors: The file's tensors under the names that they have in the model.

    Raises:
        CheckpointError: The file is damaged, or belongs to another model or config.
    """
    problems = []
    for name, update in updates(model, adapter).items():
        if problem := _problem([tensors.get(f"{name}.{kind}") for kind in "USV"], update):
            problems.append(f"{problem} in {name}")
    require(
        not problems,
        "an adapter's file must hold U, S and V of every adapted layer, finite, U and V orthonormal, κ(S) ≤ 1 + tau",
        received=listed(problems),
        remedy="Fetch it again, and check that it was trained on this base model. If it was trained without the "
        'manifold step, set "tau": "inf" in its adapter_config.json.',
        error=CheckpointError,
    )


@torch.no_grad()
def _problem(factors: list[Tensor | None], update: LowRankUpdate) -> str:
    """What contradicts the update's shapes or bound; empty if nothing does."""
    U, S, V = factors
    if U is None or S is None or V is None:
        return "no " + ", ".join(kind for kind, factor in zip("USV", factors, strict=True) if factor is None)
    wanted = [tuple(p.shape) for p in (update.U, update.S, update.V)]
    found = [tuple(X.shape) for X in (U, S, V)]
    if found != wanted:
        return f"shapes {found} for {wanted}"
    if not {X.dtype for X in (U, S, V)} <= set(FLOATS):
        return f"dtype {S.dtype}"
    if not all(torch.isfinite(X).all() for X in (U, S, V)):
        return "NaN or inf"
    if not all(can_be_orthonormal(basis, basis.dtype) for basis in (U, V)):
        return "bases that are not orthonormal"
    kappa = least_condition_number(S, S.dtype)
    return "" if obeys_bound(kappa, 1 + update.tau) else f"κ = {kappa:.4g} for {1 + update.tau:.4g}"


@torch.no_grad()
def warn_of_broken_bounds(model: nn.Module, adapter: str) -> None:
    """Warn of factors that no manifold step kept within their bound: the adapter could not be loaded again."""
    found = {name: _problem([x.U, x.S, x.V], x) for name, x in updates(model, adapter).items() if not x.U.is_meta}
    if broken := [f"{problem} in {name}" for name, problem in found.items() if problem]:
        logger.warning(
            "the adapter %s does not obey its bound (%s). Train with CondLRCallback, CondLRTrainer or "
            "attach_manifold_step; loading it will be refused unless its tau is inf",
            adapter,
            listed(broken),
        )
