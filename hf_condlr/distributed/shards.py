"""Parameters of which every process holds some rows, as FSDP2's `fully_shard` leaves them: which rows, which values.

Every function also takes ordinary tensors, of which this process holds all rows. A basis (m, r) is never gathered: what
the manifold step needs of it are sums over rows, UᵀG = Σ_j U_jᵀ G_j, see `hf_condlr.distributed.collectives`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from hf_condlr.errors import OptimizerError, require


@dataclass(frozen=True)
class Rows:
    """The rows of a matrix that this process holds.

    Attributes:
        group: The process group among which the rows are divided; None if this process holds all of them.
        index: This process's number in the group.
        size: Number of processes in the group.
        first: First row held.
        count: Number of rows held; may be 0.
        total: Number of rows of the full matrix.
    """

    group: Any
    index: int
    size: int
    first: int
    count: int
    total: int

    def spread(self, own: Tensor) -> Tensor:  # (*, count, r) -> (*, total, r)
        """Own rows in their place among zeros: the sum over the processes is the full matrix, bit for bit."""
        if self.group is None:
            return own
        spread = own.new_full((*own.shape[:-2], self.total, own.shape[-1]), -0.0)  # x + (-0.0) = x, for x = -0.0 too
        spread[..., self.first : self.first + self.count, :] = own
        return spread

    def own(self, full: Tensor) -> Tensor:  # (*, total, r) -> (*, count, r)
        """The rows of this process."""
        return full if self.group is None else full[..., self.first : self.first + self.count, :]

    def heights(self, r: int) -> list[int]:
        """min(count, r) of every process."""
        chunk = -(-self.total // self.size)
        return [max(0, min(chunk, self.total - j * chunk, r)) for j in range(self.size)]

    def beside(self, block: Tensor) -> Tensor:  # (*) -> (size, *)
        """The block in this process's place among zeros: the sum over the processes is the stack of all blocks."""
        blocks = block.new_full((self.size, *block.shape), -0.0)
        blocks[self.index] = block
        return blocks


def rows_of(p: Tensor) -> Rows:  # (m, r)
    """The rows of a parameter that this process holds.

    Raises:
        OptimizerError: The parameter is not sharded by rows over one dimension of the device mesh.
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
    """Mesh and placements of a sharded parameter, else None. Equal layouts divide rows in the same way."""
    return (p.device_mesh, p.placements) if isinstance(p, DTensor) else None


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter of the model is sharded."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def local(p: Tensor) -> Tensor:  # (m, r) -> (count, r)
    """The rows that this process holds, detached; writing into them writes into the parameter."""
    values: Any = p.detach()
    return values.to_local() if isinstance(values, DTensor) else values


def local_gradient(p: Tensor) -> Tensor:  # (m, r) -> (count, r)
    """The rows of the gradient that this process holds.

    Raises:
        OptimizerError: The gradient is not sharded as the parameter is, for example not yet summed over the processes.
    """
    gradient: Any = p.grad
    if type(p) is nn.Parameter and type(gradient) is Tensor:
        return gradient
    require(
        layout(p) == layout(gradient),
        "a gradient must be sharded as its factor is",
        received=f"{layout(gradient)} for {layout(p)}",
        remedy="Let fully_shard reduce gradients: set_requires_gradient_sync(True) before the last backward.",
        error=OptimizerError,
    )
    return local(gradient)


def full_tensor(p: Tensor) -> Tensor:  # (m, *)
    """All rows, detached. Gathers a sharded parameter: every process must call it."""
    p = p.detach()
    return p.full_tensor() if isinstance(p, DTensor) else p


def reshard(model: nn.Module) -> None:
    """Make all FSDP2 modules hold their shards: after a forward without backward some hold gathered parameters."""
    if dist.is_available() and dist.is_initialized():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@torch.no_grad()
def write_local(p: Tensor, own: Tensor) -> None:  # (m, r), (count, r)
    """Set the rows that this process holds."""
    local(p).copy_(own)


@torch.no_grad()
def write_full(p: Tensor, values: Tensor) -> None:  # (m, *), (m, *)
    """Set a parameter from the values of all its rows; each process takes its own."""
    rows = rows_of(p) if p.ndim else None
    local(p).copy_(values if rows is None else values[rows.first : rows.first + rows.count])
