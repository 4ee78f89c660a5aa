"""Factors that every process holds a copy of: they must stay equal, bit for bit, and this says when they do not.

DDP gives every process the same gradients, and each of them takes the same step with its copy. Nothing in that brings
copies together again once they differ: a seed, a callback on one process, other libraries or broken memory, and every
process trains a model of its own from there on, whose average gradient belongs to none of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from hf_condlr.errors import DriftError

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def is_replicated() -> bool:
    """Whether other processes train too."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_due(step: int, interval: int) -> bool:
    """After the first step, where most mistakes show, and every `interval` steps; the same on every process."""
    return interval > 0 and (step == 1 or step % interval == 0)


def checksum(X: Tensor) -> Tensor:  # (m, r) -> () int64
    """Of the bits, modulo 2⁶⁴: one entry that differs always changes it."""
    columns = X.detach().view(_BITS[X.element_size()]).sum(0, dtype=torch.int64)
    weights = torch.arange(columns.numel(), device=X.device) * 2 + 1  # odd, so that none of them divides 2⁶⁴
    return (columns * weights).sum()


def check_replicas(factors: dict[str, Tensor], numbers: dict[str, float], *, step: int) -> None:
    """Compare this process's factors and numbers with those of all others, in one all-reduce of 16 bytes for each.

    Every process must call it at the same step, and on every process it returns or raises. Sharded factors, of which
    no process holds a copy, are left out. On a GPU it waits for the device.

    Args:
        factors: {name: (m, r)}.
        numbers: {name: value}, what else must be equal.
        step: For the message.

    Raises:
        DriftError: Some process holds other values.
    """
    whole = {name: X for name, X in factors.items() if not isinstance(X, DTensor)}
    if not whole:
        return
    device = next(iter(whole.values())).device
    sums = torch.stack([checksum(X).to(device) for X in whole.values()])
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device).view(torch.int64)
    mine = torch.cat([sums, values])
    extremes = torch.cat([mine, mine.bitwise_not()])  # the largest ~x is that of the smallest x; −x can overflow
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = extremes[: len(mine)], extremes[len(mine) :].bitwise_not()
    differs = (largest != smallest).tolist()
    if any(differs):
        _raise_drift([name for name, bad in zip([*whole, *numbers], differs, strict=True) if bad], mine, step)


def _raise_drift(names: list[str], mine: Tensor, step: int) -> None:
    """Every process comes here or none does, so that they can ask one another which of them differ."""
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    others = [str(rank) for rank, theirs in enumerate(everyone) if not torch.equal(theirs, everyone[0])]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    raise DriftError(
        "every process must hold the same factors, bit for bit",
        received=f"others than process 0's on process {', '.join(others)} after step {step}: "
        f"{', '.join(names[:5])}{more}",
        remedy="Go on from the last checkpoint, and look for what writes weights, or draws random numbers that reach "
        "them, on some processes only. Where processes train different models on purpose, set drift_check_interval=0.",
    )


def of_first_process(numbers: dict[str, float], device: torch.device) -> dict[str, float]:
    """Process 0's numbers, on every process: DDP hands out its weights in the same way."""
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    dist.broadcast(values, src=0)
    return dict(zip(numbers, values.tolist(), strict=True))
