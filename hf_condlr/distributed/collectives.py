"""Sums over processes of terms that each of them computes from its own rows.

A computation that needs such sums is written as a generator, `Work`. It yields a list of this process's terms and
receives the list of their sums over all processes:

    gram, flags = yield [X.mT @ X, flags]

`run` drives many of them at once, so that one all-reduce serves all terms that are due.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from hf_condlr.distributed.shards import Rows, local

T = TypeVar("T")

Work = Generator[list[Tensor], list[Tensor], T]

BUCKET = 2**25  # entries of the r×r blocks that are summed, and held in memory, at the same time


class Task(NamedTuple):
    """Work on the rows of some matrices."""

    rows: Rows
    work: Work[None]
    entries: int
    """Entries of the r×r blocks that the work sums, for the size of a bucket."""


def run(tasks: Iterable[Task]) -> None:
    """Finish all tasks: local ones one after the other, sharded ones together.

    Args:
        tasks: The same tasks in the same order on every process.
    """
    sharded = []
    for task in tasks:
        if task.rows.group is None:
            finish(task.work, task.rows)
        else:
            sharded.append(task)
    for bucket in _buckets(sharded):
        _run_together(bucket)


def finish(work: Work[T], rows: Rows) -> T:
    """Run one computation to its end and return its result; every process that holds rows must call it."""
    try:
        terms = next(work)
        while True:
            terms = work.send(sum_over_processes(rows, *terms))
    except StopIteration as end:
        return end.value


def sum_over_processes(rows: Rows, *terms: Tensor) -> list[Tensor]:
    """The sums of all processes' terms; the terms themselves where this process holds all rows."""
    return list(terms) if rows.group is None else _sums([(rows, terms)])[0]


def anywhere(flag: bool | Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """Whether `flag` is true on one of the processes that share the rows of `tensors`; all of them must call it."""
    flags = torch.as_tensor(flag)
    for p in tensors:
        if isinstance(p, DTensor):
            flags = flags.to(device=local(p).device, dtype=torch.float32)
            for i in range(p.device_mesh.ndim):
                dist.all_reduce(flags, group=p.device_mesh.get_group(i))
            break
    return flags > 0


def _buckets(tasks: list[Task]) -> Iterator[list[Task]]:
    bucket: list[Task] = []
    filled = 0
    for task in tasks:
        if bucket and filled + task.entries > BUCKET:
            yield bucket
            bucket, filled = [], 0
        bucket.append(task)
        filled += task.entries
    yield bucket


def _run_together(tasks: list[Task]) -> None:
    """Advance all tasks from sum to sum until each has finished."""
    received: list[list[Tensor] | None] = [None] * len(tasks)
    while tasks:
        requests = []
        for task, sums in zip(tasks, received, strict=True):
            with suppress(StopIteration):
                requests.append((task, next(task.work) if sums is None else task.work.send(sums)))
        tasks = [task for task, _ in requests]
        received = list(_sums([(task.rows, terms) for task, terms in requests]))


def _sums(requests: list[tuple[Rows, Sequence[Tensor]]]) -> list[list[Tensor]]:
    """The sums over the processes of each request's terms, with one all-reduce for each group, dtype and device."""
    results = [list(terms) for _, terms in requests]
    places: dict[tuple, list[tuple[int, int]]] = {}
    for i, (rows, terms) in enumerate(requests):
        for j, term in enumerate(terms):
            places.setdefault((rows.group, term.dtype, term.device), []).append((i, j))
    for (group, _, _), alike in places.items():
        terms = [results[i][j] for i, j in alike]
        flat = torch.cat([term.reshape(-1) for term in terms])
        dist.all_reduce(flat, group=group)
        for (i, j), term, total in zip(alike, terms, flat.split([term.numel() for term in terms]), strict=True):
            results[i][j] = total.view(term.shape)
    return results
