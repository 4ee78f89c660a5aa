"""Peak memory of a call in a process of its own: on CUDA the allocator's, on Linux the largest resident memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

PROC = Path("/proc/self")

# glibc maps arrays from this size on by themselves, and unmaps them when they are freed; read when a process starts.
GIVING_BACK = mock.patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536")


def resident(key: str = "VmRSS") -> int:
    """VmRSS or VmHWM in bytes, 0 where they are not known: `getrusage` would start from the parent's peak."""
    if not (PROC / "clear_refs").exists():
        return 0
    lines = (PROC / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def peak_of(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes at the peak of a call, all that the process or device holds; None where it cannot be measured."""
    on_linux = (PROC / "clear_refs").exists()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif on_linux:
        (PROC / "clear_refs").write_text("5")  # forgets the peak so far
    call()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM") if on_linux else None
