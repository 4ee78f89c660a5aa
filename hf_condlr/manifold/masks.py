"""Which matrices are sound, and choices among them that do not wait for the device where the host runs ahead of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_condlr.linalg import per_matrix


def runs_ahead(X: Tensor) -> bool:
    """Whether the host queues work for the device of X: reading a value back makes it wait for all of that work."""
    return X.device.type == "cuda"


def finite(X: Tensor) -> Tensor:  # (L, m, r) -> (L,) bool
    """Whether every entry is finite, from the sum, in one pass: NaN and inf stay in it. Its overflow counts too."""
    return torch.isfinite(X.sum(dim=(-2, -1)))


def squares(G: Tensor) -> Tensor:  # (L, m, r) -> (L,)
    """‖G‖_F², not finite where an entry is not."""
    return torch.linalg.vector_norm(G, dim=(-2, -1)).square()


def usable_squares(norms_squared: Tensor) -> Tensor:  # (L,) -> (L,) bool
    """Whether ‖G‖_F² shows a finite G, small enough for an optimizer to sum squares: ‖G‖_F ≤ 2.6e15 in float32."""
    return norms_squared <= torch.finfo(norms_squared.dtype).max ** 0.8


def differs(X: Tensor, Y: Tensor) -> Tensor:  # (L, m, r), (L, m, r) -> (L,) bool
    """Whether some entry of X differs from that of Y; on a CPU the first one that does ends the search."""
    if runs_ahead(X):
        return (X != Y).flatten(1).any(1)
    return torch.tensor([not torch.equal(x, y) for x, y in zip(X, Y, strict=True)], device=X.device)


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
