"""Factors of which every process holds a copy, as under DDP: a check that the copies are equal, bit for bit.

Every process gets the same gradients and takes the same step with its copy. Nothing brings copies together again once
they differ (through a seed, a callback on one process, other library versions, faulty memory): from then on every
process trains a different model, with an average gradient that belongs to none of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from hf_condlr.errors import DriftError, listed


def several_processes() -> bool:
    """Whether this is one of several processes of torch.distributed, in any layout of the parameters."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_due(step: int, interval: int) -> bool:
    """Whether a check is due: after the first step, where most mistakes show, and after every `interval` steps."""
    return interval > 0 and (step == 1 or step % interval == 0)


def checksums(blocks: Sequence[Tensor]) -> Tensor:  # (l, m, r) each -> (L,) int64
    """Checksums modulo 2⁶⁴ of the bits of float32 or float64 matrices. They do not depend on the order of summation.

    The bits are read once, as rows of about √(mr) integers that are added up. The weights of the sums are odd, so that
    a change of one entry always changes the checksum. They differ, so that most other changes do; not all: entries that
    change places within a column of that table, or in some shapes the signs of all entries, leave it as it is.

    Args:
        blocks: Stacks of matrices, all of the same shape (m, r).
    """
    if not blocks[0].numel():  # no rows on this process
        return torch.zeros(sum(map(len, blocks)), dtype=torch.int64, device=blocks[0].device)
    sums = torch.cat([_sums_of_bits(X) for X in blocks])
    sums += sums >> 32  # otherwise an even number of changed signs could vanish modulo 2⁶⁴
    return (sums * (2 * torch.arange(sums.shape[1], device=sums.device) + 1)).sum(1)


def _sums_of_bits(X: Tensor) -> Tensor:  # (l, m, r) -> (l, w) int64
    flat = X.detach().flatten(1).contiguous()
    integers = torch.int32 if flat.shape[1] * flat.element_size() % 8 else torch.int64  # two float32 at once
    try:
        bits = flat.view(integers)
    except RuntimeError:  # X begins at an odd place of a larger tensor
        bits = flat.clone().view(integers)
    n = bits.shape[1]
    width = math.isqrt(n) | 1
    height = n // width
    table, rest = bits.split([height * width, n - height * width], dim=1)
    sums = table.unflatten(1, (height, width)).sum(1, dtype=torch.int64)
    sums.narrow(1, 0, rest.shape[1]).add_(rest)
    return sums


def check_replicas(factors: Mapping[str, Tensor], numbers: dict[str, float], *, step: int) -> None:
    """Compare this process's factors and numbers with those of all others, in one all-reduce of 16 bytes for each.

    Every process must call it at the same step; it returns on all of them or raises on all of them. Sharded factors
    have no copies and are left out. On a GPU the host waits for the device.

    Args:
        factors: {name: (m, r)}.
        numbers: {name: value}, other values that must be equal.
        step: Number of the step, for the message.

    Raises:
        DriftError: Some process holds other values.
    """
    copies = {name: X for name, X in factors.items() if not isinstance(X, DTensor)}
    if not copies:
        return
    device = next(iter(copies.values())).device
    sums = torch.cat([checksums([X[None]]).to(device) for X in copies.values()])
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device).view(torch.int64)
    mine = torch.cat([sums, values])
    extremes = torch.cat([mine, mine.bitwise_not()])  # the largest ~x is that of the smallest x; −x can overflow
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, smallest = extremes[: len(mine)], extremes[len(mine) :].bitwise_not()
    differs = (largest != smallest).tolist()
    if any(differs):
        _raise_drift([name for name, bad in zip([*copies, *numbers], differs, strict=True) if bad], mine, step)


def _raise_drift(names: list[str], mine: Tensor, step: int) -> None:
    """Raise on every process, naming those that differ from process 0. All processes call it, or none."""
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    others = [str(rank) for rank, theirs in enumerate(everyone) if not torch.equal(theirs, everyone[0])]
    raise DriftError(
        "every process must hold the same factors, bit for bit",
        received=f"others than process 0's on process {', '.join(others)} after step {step}: {listed(names)}",
        remedy="Go on from the last checkpoint, and look for what writes weights, or draws random numbers that reach "
        "them, on some processes only. Where processes train different models on purpose, set drift_check_interval=0.",
    )


def from_first_process(numbers: dict[str, float], device: torch.device) -> dict[str, float]:
    """Process 0's numbers, on every process, as DDP distributes the weights of process 0."""
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    dist.broadcast(values, src=0)
    return dict(zip(numbers, values.tolist(), strict=True))
