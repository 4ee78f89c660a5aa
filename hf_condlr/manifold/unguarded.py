"""Optimizers that would move factors without the manifold step: a second one, one around it, or a copy."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hf_condlr.errors import OptimizerError, listed, require
from hf_condlr.manifold.requirements import factors_of, hook_owners

_MARK = "manifold_step"  # in the optimizer's defaults, which copies and pickles keep while they lose the hooks
_handles: WeakSet[Any] = WeakSet()
_global_hooks: list[Any] = []


def guard(handle: Any) -> None:
    """Refuse, from now on, steps of other optimizers that would move the factors of this handle."""
    if not _global_hooks:
        _global_hooks.append(register_optimizer_step_pre_hook(_refuse_unguarded))
    _handles.add(handle)
    for optimizer in handle.optimizers:
        optimizer.defaults[_MARK] = True


def forget(handle: Any) -> None:
    """Forget a removed handle: its factors may be moved."""
    _handles.discard(handle)
    for optimizer in handle.optimizers:
        optimizer.defaults.pop(_MARK, None)


def _refuse_unguarded(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Hook before the step of any optimizer: refuse a step that moves factors unguarded."""
    if any(owner in _handles for owner in hook_owners(optimizer)):
        return
    moved = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    others = [handle for handle in _handles if not handle.is_stepping]  # inside of a step the handle projects the rest
    found = [name for handle in others for name, p in factors_of(handle.layers).items() if id(p) in moved]
    copied = _MARK in optimizer.defaults
    require(
        not found and not copied,
        f"factors{f' ({listed(found)})' if found else ''} must be moved by an optimizer that has the manifold step",
        received=f"{type(optimizer).__name__}, which has " + ("lost it, as a copy does" if copied else "none"),
        remedy="Call attach_manifold_step for the optimizer that is stepped; before that, remove() the handle of "
        "another one that holds the same factors.",
        error=OptimizerError,
    )
