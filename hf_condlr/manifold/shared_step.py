"""The step shared out: every process projects a part of the stacks, and one gathering hands the results round.

Under DDP every process has the same factors and the same gradients, and each of them would retract and condition all
of them. A stack is what is shared out, never a part of one: its owner computes what everybody else would have
computed, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from hf_condlr.distributed.collectives import Work, run
from hf_condlr.errors import OptimizerError
from hf_condlr.manifold.bases import BasisStack
from hf_condlr.manifold.cores import CoreStack

# Of conditioning (r, r), over r³; the retraction of (m, r) costs 1 over m r². Measured on a CPU: 4.5 to 13.
CORE_COST = 6


ALIGNMENT = 8  # bytes, so that every piece of a buffer can be read as any dtype


def owners(costs: Sequence[float], processes: int) -> list[int]:
    """Which process takes each piece: the dearest first, to whoever has least. The same answer on every process."""
    found, load = [0] * len(costs), [0.0] * processes
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[i] = min(range(processes), key=load.__getitem__)
        load[found[i]] += costs[i]
    return found


def project_shared(
    stacks: Sequence[BasisStack | CoreStack], work_on: Callable[[BasisStack | CoreStack], Work], *, step: int
) -> None:
    """Project each stack on one process, and give all others its result. Every process must call it.

    What goes round is each factor once, and two flags a factor. On a GPU the host waits for it. Sharded factors, of
    which every process has its own rows, all of them project together.

    Args:
        stacks: Of the same factors on every process.
        work_on: The projection of a stack, which sets its `usable`.
        step: Number of the step.

    Raises:
        OptimizerError: Another process failed in its part. That process raises its own error.
    """
    run((stack.rows, stack.entries, work_on(stack)) for stack in stacks if stack.rows.group is not None)
    whole = [stack for stack in stacks if stack.rows.group is None]
    if not whole:
        return
    parts = _parts(whole)
    mine = parts[dist.get_rank()]
    failure = None
    try:
        run((stack.rows, stack.entries, work_on(stack)) for stack in mine)
    except Exception as error:  # the others are waiting: they are told before it is raised
        failure = error
    size = ALIGNMENT + max(sum(_bytes(stack) for stack in part) for part in parts)
    sent = torch.zeros(size, dtype=torch.uint8, device=whole[0].held_at.device)
    if failure is None:
        _pack(mine, sent, step)
    else:
        sent[0] = 1
    received = [torch.empty_like(sent) for _ in parts]
    dist.all_gather(received, sent)
    if failure is not None:
        raise failure
    _check_failures(received)
    for part, buffer in zip(parts, received, strict=True):
        if part is not mine:
            _unpack(part, buffer, step)


def _parts(stacks: Sequence[BasisStack | CoreStack]) -> list[list[BasisStack | CoreStack]]:
    """The stacks of each process."""
    processes = dist.get_world_size()
    owner = owners([_cost(stack) for stack in stacks], processes)
    return [[stack for stack, i in zip(stacks, owner, strict=True) if i == process] for process in range(processes)]


def _check_failures(received: list[Tensor]) -> None:
    flags = torch.stack([buffer[0] for buffer in received])
    failed = [str(process) for process, flag in enumerate(flags.tolist()) if flag]
    if failed:
        raise OptimizerError(
            "every process must finish its part of a shared step",
            received=f"a failure on process {', '.join(failed)}",
            remedy="See the error that it raised.",
        )


def _cost(stack: BasisStack | CoreStack) -> float:
    m, r = stack.parameters[0].shape
    return len(stack.parameters) * m * r**2 * (CORE_COST if isinstance(stack, CoreStack) else 1)


def _pieces(stack: BasisStack | CoreStack, step: int) -> list[Tensor]:
    """What the others need of a stack: its factors, which of them are usable, and which vanished in this step."""
    vanished = stack.vanished_at == step if isinstance(stack, CoreStack) else torch.zeros_like(stack.usable)
    return [*(p.detach() for p in stack.parameters), stack.usable, vanished]


def _bytes(stack: BasisStack | CoreStack) -> int:
    flags = 2 * _aligned(len(stack.parameters))
    return sum(_aligned(p.nbytes) for p in stack.parameters) + flags


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pack(part: Sequence[BasisStack | CoreStack], buffer: Tensor, step: int) -> None:
    place = ALIGNMENT
    for stack in part:
        for piece in _pieces(stack, step):
            buffer[place : place + piece.nbytes] = piece.reshape(-1).view(torch.uint8)
            place += _aligned(piece.nbytes)


def _unpack(part: Sequence[BasisStack | CoreStack], buffer: Tensor, step: int) -> None:
    place = ALIGNMENT
    for stack in part:
        values = []
        for piece in _pieces(stack, step):
            values.append(buffer[place : place + piece.nbytes].view(piece.dtype).view(piece.shape))
            place += _aligned(piece.nbytes)
        *factors, usable, vanished = values
        stack.receive(factors, usable, vanished, step)
