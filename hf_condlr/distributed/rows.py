"""Factors of which every process holds some rows, as FSDP2's `fully_shard` leaves them: what they are, and their sums.

A basis (m, r) is never gathered. Whatever the manifold step asks of it is a sum over rows, UᵀG = Σ_j U_jᵀ G_j, of r×r
blocks, after which every process goes on alone with the same numbers, and so decides alike. QR by rows (TSQR) is from
Demmel, Grigori, Hoemmen, Langou, *Communication-optimal parallel and sequential QR and LU factorizations*, 2012.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from hf_condlr.errors import OptimizerError


@dataclass(frozen=True)
class Rows:
    """Rows [first, first + count) of `total`, on process `index` of `size` in `group`; all where that is None."""

    group: Any
    index: int
    size: int
    first: int
    count: int
    total: int

    def spread(self, own: Tensor) -> Tensor:  # (*, count, r) -> (*, total, r)
        """The own rows at their place among zeros: the sum over the processes is the whole matrix, to the bit."""
        if self.group is None:
            return own
        whole = own.new_full((*own.shape[:-2], self.total, own.shape[-1]), -0.0)  # x + (-0.0) = x, for x = -0.0 too
        whole[..., self.first : self.first + self.count, :] = own
        return whole

    def own(self, whole: Tensor) -> Tensor:  # (*, total, r) -> (*, count, r)
        """The rows of this process."""
        return whole if self.group is None else whole[..., self.first : self.first + self.count, :]

    def heights(self, r: int) -> list[int]:
        """min(count, r) of every process."""
        chunk = -(-self.total // self.size)
        return [max(0, min(chunk, self.total - j * chunk, r)) for j in range(self.size)]

    def beside(self, block: Tensor) -> Tensor:  # (*) -> (size, *)
        """The block at this process's place among zeros: the sum is the stack of all processes' blocks."""
        blocks = block.new_full((self.size, *block.shape), -0.0)
        blocks[self.index] = block
        return blocks


def rows_of(p: Tensor) -> Rows:  # (m, r)
    """Which rows of a factor this process holds.

    Raises:
        OptimizerError: It is sharded in another way than by rows over one dimension of the device mesh.
    """
    if not isinstance(p, DTensor):
        return Rows(None, 0, 1, 0, p.shape[0], p.shape[0])
    split = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    if not split:
        return Rows(None, 0, 1, 0, p.shape[0], p.shape[0])
    if len(split) == 1 and p.placements[split[0]] == Shard(0):
        mesh, dimension = p.device_mesh, split[0]
        index, size, m = mesh.get_local_rank(dimension), mesh.size(dimension), p.shape[0]
        chunk = -(-m // size)
        first = min(index * chunk, m)
        rows = Rows(mesh.get_group(dimension), index, size, first, min(chunk, m - first), m)
        if local(p).shape[0] == rows.count:
            return rows
    raise OptimizerError(
        "factors must be sharded by rows, Shard(0), over one dimension of the device mesh",
        received=f"{p.placements} on a mesh of {tuple(p.device_mesh.shape)}",
        remedy="Shard with fully_shard(module, mesh=...) on a mesh of one dimension, or (replicate, shard) of two, "
        "without a shard_placement_fn for U, S and V, and without tensor parallelism.",
    )


def layout(p: Tensor) -> Any:
    """What factors have in common whose rows lie alike; to compare."""
    return (p.device_mesh, p.placements) if isinstance(p, DTensor) else None


def local(p: Tensor) -> Tensor:  # (m, r) -> (count, r)
    """The own rows of a factor, detached; writing into them writes into it."""
    values: Any = p.detach()
    return values.to_local() if isinstance(values, DTensor) else values


def version(p: Tensor) -> int:
    """How often its own rows were written: torch counts."""
    return (p if layout(p) is None else local(p))._version


def local_gradient(p: Tensor) -> Tensor:  # (m, r) -> (count, r)
    """The own rows of its gradient.

    Raises:
        OptimizerError: The gradient is not sharded as the factor is: it is not summed over the processes yet, say.
    """
    gradient: Any = p.grad
    if type(p) is nn.Parameter and type(gradient) is Tensor:
        return gradient
    if layout(p) != layout(gradient):
        raise OptimizerError(
            "a gradient must be sharded as its factor is",
            received=f"{layout(gradient)} for {layout(p)}",
            remedy="Let fully_shard reduce gradients: set_requires_gradient_sync(True) before the last backward.",
        )
    return local(gradient)


def whole(p: Tensor) -> Tensor:  # (m, r)
    """All rows of a core, detached, gathered where they are sharded: every process must ask."""
    p = p.detach()
    return p.full_tensor() if isinstance(p, DTensor) else p


def reshard(model: nn.Module) -> None:
    """Let layers hold their shards again: after a forward without backward some hold whole copies, in low precision."""
    if dist.is_available() and dist.is_initialized():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter is."""
    return any(isinstance(p, DTensor) for p in model.parameters())


@torch.no_grad()
def write(p: Tensor, own: Tensor) -> None:  # (m, r), (count, r)
    """Set a factor's own rows."""
    local(p).copy_(own)


@torch.no_grad()
def write_whole(p: Tensor, values: Tensor) -> None:  # (m, *), (m, *)
    """Set a parameter from all its rows, which this process has."""
    rows = rows_of(p) if p.ndim else None
    local(p).copy_(values if rows is None else values[rows.first : rows.first + rows.count])
