"""Products in true float32, whatever precision is set outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in true float32, whatever autocast or TF32 settings hold outside: half of it breaks the guarantee."""
    backends = [b for b in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)) if b]
    settings: list[tuple[Any, str, Any]] = [
        (b, "fp32_precision", "ieee") for b in backends if hasattr(b, "fp32_precision")
    ]
    settings = settings or [(torch.backends.cuda.matmul, "allow_tf32", False)]  # torch < 2.9
    previous = [getattr(b, name) for b, name, _ in settings]
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
