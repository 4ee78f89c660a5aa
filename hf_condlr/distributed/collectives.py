"""Sums over processes of what each computes from its own rows."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from hf_condlr.distributed.rows import Rows, local

# A piece of work that yields lists of its own rows' tensors, and on going on finds in them the sums over all processes.
Work = Generator[list[Tensor], None, None]


BUCKET = 2**25  # entries of the blocks that are summed, and held, at a time


def anywhere(flag: bool, tensors: Iterable[Tensor]) -> bool:
    """Whether a flag is raised on one of the processes that hold rows of `tensors`; all of them must ask."""
    for p in tensors:
        if isinstance(p, DTensor):
            flags = torch.tensor(float(flag), device=local(p).device)
            for i in range(p.device_mesh.ndim):
                dist.all_reduce(flags, group=p.device_mesh.get_group(i))
            return flags.item() > 0
    return flag


def run(works: Iterable[tuple[Rows, int, Work]]) -> None:
    """Do each piece of work: alone, one after the other; sharded ones at once, with one all-reduce for all of a round.

    Args:
        works: Rows, number of entries of its r×r blocks, and the work. The same ones, in the same order, everywhere.
    """
    sharded = []
    for rows, entries, work in works:
        if rows.group is None:
            for _ in work:  # what it yields are the sums already
                pass
        else:
            sharded.append((rows, entries, work))
    for bucket in _buckets(sharded):
        while bucket:
            requests = [(rows, work, request) for rows, work in bucket if (request := next(work, None)) is not None]
            _sum_all([(rows.group, request) for rows, _, request in requests])
            bucket = [(rows, work) for rows, work, _ in requests]


def _buckets(works: list[tuple[Rows, int, Work]]) -> Iterator[list[tuple[Rows, Work]]]:
    bucket: list[tuple[Rows, Work]] = []
    filled = 0
    for rows, entries, work in works:
        if bucket and filled + entries > BUCKET:
            yield bucket
            bucket, filled = [], 0
        bucket.append((rows, work))
        filled += entries
    yield bucket


def _sum_all(requests: list[tuple[Any, list[Tensor]]]) -> None:
    """Put the sums over the processes in place of the tensors of each list; one all-reduce for a group and a dtype."""
    parts: dict[tuple, list[tuple[list[Tensor], int]]] = {}
    for group, tensors in requests:
        for i, X in enumerate(tensors):
            parts.setdefault((group, X.dtype, X.device), []).append((tensors, i))
    for (group, _, _), places in parts.items():
        flat = torch.cat([tensors[i].reshape(-1) for tensors, i in places])
        dist.all_reduce(flat, group=group)
        sums = flat.split([tensors[i].numel() for tensors, i in places])
        for (tensors, i), total in zip(places, sums, strict=True):
            tensors[i] = total.view(tensors[i].shape)


def sum_over_processes(rows: Rows, *own: Tensor) -> list[Tensor]:
    """The sums over all processes of what each of them has; every process must ask."""
    tensors = list(own)
    if rows.group is not None:  # else it is the sum
        _sum_all([(rows.group, tensors)])
    return tensors
