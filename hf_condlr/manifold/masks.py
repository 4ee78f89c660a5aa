"""Choices along a stack (L, m, r) of matrices that do not wait for the device where the host runs ahead of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_condlr.linalg import per_matrix


def runs_ahead(X: Tensor) -> bool:
    """Whether the host queues work for the device of X: reading a value back makes it wait for all of that work."""
    return X.device.type == "cuda"


def finite(X: Tensor) -> Tensor:  # (L, m, r) -> (L,) bool
    """Whether every entry is finite, from the extremes, which propagate NaN: 30 times cheaper than `isfinite(X)`."""
    if not X.numel():  # no rows on this process
        return torch.ones(len(X), dtype=torch.bool, device=X.device)
    flat = X.flatten(1)
    return torch.isfinite(flat.amax(1)) & torch.isfinite(flat.amin(1))


def squarable(G: Tensor) -> Tensor:  # (L, m, r) -> (L,) bool
    """Whether every entry is finite and small enough for an optimizer to sum its squares: 2.6e15 in float32."""
    if not G.numel():
        return finite(G)
    flat = G.flatten(1)
    return torch.maximum(flat.amax(1), -flat.amin(1)) <= torch.finfo(G.dtype).max ** 0.4


def moved(displacement: Tensor) -> Tensor:  # (L, m, r) -> (L,) bool
    """Whether some entry is not zero."""
    if not displacement.numel():
        return torch.zeros(len(displacement), dtype=torch.bool, device=displacement.device)
    return (displacement.flatten(1).amax(1) != 0) | (displacement.flatten(1).amin(1) != 0)


def as_number(flags: Tensor, like: Tensor) -> Tensor:  # (L,) bool -> (L,)
    """Flags as 0 and 1 in the dtype of `like`, to be summed over processes together with it."""
    return flags.to(like.dtype)


def surely_all(mask: Tensor) -> bool:
    """Whether a mask is true everywhere; False where finding out would make the host wait for the device."""
    return not runs_ahead(mask) and bool(mask.all())


def select(mask: Tensor, X: Tensor, otherwise: Tensor | float) -> Tensor:  # (L,), (L, m, r) -> (L, m, r)
    """`torch.where` along the stack, without a copy in the usual case that the mask is true everywhere."""
    return X if surely_all(mask) else torch.where(per_matrix(mask), X, otherwise)


def read_later(flag: Tensor) -> Callable[[], bool]:  # () bool
    """Begin to copy a flag to the host. Calling the result waits for what is queued now, not for what comes after."""
    if flag.device.type != "cuda":
        return lambda: bool(flag)
    copy = flag.to("cpu", non_blocking=True)
    copied = torch.cuda.current_stream(flag.device).record_event()

    def read() -> bool:
        copied.synchronize()
        return bool(copy)

    return read
