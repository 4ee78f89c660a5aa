"""What the manifold step asks of a device."""

from __future__ import annotations

from torch import Tensor


def runs_ahead(X: Tensor) -> bool:
    """Whether the host queues work for the device of X, so that reading a value back makes it wait for all of it."""
    return X.device.type == "cuda"
