"""At least float32, and products in true float32 under any autocast or TF32 setting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


def per_matrix(x: Tensor) -> Tensor:  # (*,) -> (*, 1, 1)
    """Reshape one number per matrix of a stack so that it multiplies or masks the matrices."""
    return x.unsqueeze(-1).unsqueeze(-1)


def at_least_float32(X: Tensor) -> Tensor:
    """Widen half precision: LAPACK has no half kernels, and a Gram matrix in bfloat16 has two digits."""
    return X if X.dtype in (torch.float32, torch.float64) else X.float()


def wide_device(X: Tensor) -> torch.device:
    """The device of X, or the CPU where that has no float64."""
    return torch.device("cpu") if X.device.type == "mps" else X.device  # MPS has no float64


def to_float64(X: Tensor) -> Tensor:
    """X in float64, on the CPU where its device has none."""
    return X.to(device=wide_device(X), dtype=torch.float64)


def largest_entry(S: Tensor) -> Tensor:  # (*, m, n) -> (*, 1, 1)
    """max|S| of each matrix in float64, 1 where S = 0. Divided by it, no product of a matrix overflows."""
    largest = to_float64(S.abs().amax(dim=(-2, -1), keepdim=True))
    return torch.where(largest > 0, largest, torch.ones_like(largest))


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute products in true float32 under any autocast or TF32 setting; less would break the guarantee."""
    settings = _settings()
    previous = [_previous(backend, name) for backend, name, _ in settings]
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


def _settings() -> list[tuple[Any, str, Any]]:
    """(backend, attribute, value) of every setting that makes products exact."""
    backends = [b for b in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)) if b]
    found: list[tuple[Any, str, Any]] = [
        (b, "fp32_precision", "ieee") for b in backends if hasattr(b, "fp32_precision")
    ]
    return found or [(torch.backends.cuda.matmul, "allow_tf32", False)]  # torch < 2.9


def _previous(backend: Any, name: str) -> Any:
    """The value to restore. A value equal to that of the wider setting is left to follow the wider setting."""
    value = getattr(backend, name)
    wider = torch.backends.cudnn if backend is torch.backends.cuda.matmul else torch.backends.mkldnn
    return "none" if name == "fp32_precision" and value == getattr(wider, name) else value
