"""Products in true float32, whatever precision is set outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in true float32, whatever autocast or TF32 settings hold outside: half of it breaks the guarantee."""
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
    """Backends, and what makes their products exact."""
    backends = [b for b in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)) if b]
    found: list[tuple[Any, str, Any]] = [
        (b, "fp32_precision", "ieee") for b in backends if hasattr(b, "fp32_precision")
    ]
    return found or [(torch.backends.cuda.matmul, "allow_tf32", False)]  # torch < 2.9


def _previous(backend: Any, name: str) -> Any:
    """What to set afterwards. A value that may be the wider setting's is left to that, which may yet change."""
    value = getattr(backend, name)
    wider = torch.backends.cudnn if backend is torch.backends.cuda.matmul else torch.backends.mkldnn
    return "none" if name == "fp32_precision" and value == getattr(wider, name) else value
