"""Factors of which every process holds some rows, as FSDP2's `fully_shard` leaves them: what they are, and their sums.

A basis (m, r) is never gathered. Whatever the manifold step asks of it is a sum over rows, UᵀG = Σ_j U_jᵀ G_j, of r×r
blocks, after which every process goes on alone with the same numbers, and so decides alike. QR by rows (TSQR) is from
Demmel, Grigori, Hoemmen, Langou, *Communication-optimal parallel and sequential QR and LU factorizations*, 2012.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from hf_condlr import linalg
from hf_condlr.errors import OptimizerError

# A piece of work that yields lists of its own rows' tensors, and on going on finds in them the sums over all processes.
Work = Generator[list[Tensor], None, None]
BUCKET = 2**25  # entries of the blocks that are summed, and held, at a time


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


def anywhere(flag: bool, tensors: Iterable[Tensor]) -> bool:
    """Whether a flag is raised on one of the processes that hold rows of `tensors`; all of them must ask."""
    for p in tensors:
        if isinstance(p, DTensor):
            flags = torch.tensor(float(flag), device=local(p).device)
            for i in range(p.device_mesh.ndim):
                dist.all_reduce(flags, group=p.device_mesh.get_group(i))
            return flags.item() > 0
    return flag


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter is."""
    return any(isinstance(p, DTensor) for p in model.parameters())


# ---------------------------------------------------------------------------------------------------- joint work


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


def _sum(rows: Rows, *own: Tensor) -> list[Tensor]:
    tensors = list(own)
    if rows.group is not None:  # else it is the sum
        _sum_all([(rows.group, tensors)])
    return tensors


# ------------------------------------------------------------------------------------------- functions of factors


def orthonormality_error(U: Tensor) -> Tensor:  # (m, r) -> ()
    """‖UᵀU − I‖_F in float64, of whole or sharded bases; every process must ask."""
    rows, own = rows_of(U), local(U)
    if rows.group is None:
        return linalg.orthonormality_error(own)
    own = _wide(own)
    (gram,) = _sum(rows, own.mT @ own)
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))


def gram_times(U: Tensor, Z: Tensor) -> Tensor:  # (m, r), (r, k) -> (r, k)
    """UᵀU Z; every process must ask."""
    own = local(U).to(Z.dtype)
    return _sum(rows_of(U), own.mT @ (own @ Z))[0]


def is_finite(p: Tensor) -> bool:  # (m, r)
    """Whether every entry is, on all processes, which must all ask."""
    return not _sum(rows_of(p), torch.isfinite(local(p)).logical_not().sum())[0].item()


def qr(U: Tensor) -> tuple[Tensor, Tensor]:  # (m, r) -> (count, r), (r, r)
    """The own rows of Q, and R, of U = QR in float64; of sharded bases by TSQR, which gathers r×r blocks."""
    rows, own = rows_of(U), _wide(local(U))
    if rows.group is None:
        return tuple(torch.linalg.qr(own))
    Q, R, scale = linalg.scaled_qr(own)
    gathered = _sum(rows, rows.beside(R), rows.beside(scale))
    blocks, R, scale = linalg.joined_qr(gathered[0], gathered[1], rows.heights(R.shape[-1]))
    return Q @ blocks[rows.index], R * scale


def orthonormalize(U: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # (m, r), (r, r), (n, r)
    """As `linalg.orthonormalize`, in float64: the own rows of Q_U, the whole core R_U S R_Vᵀ, the own rows of Q_V."""
    (Q_U, R_U), (Q_V, R_V) = qr(U), qr(V)
    return Q_U, R_U @ _wide(whole(S)) @ R_V.mT, Q_V


def _wide(X: Tensor) -> Tensor:
    return X.to(device=linalg.wide_device(X), dtype=torch.float64)


@torch.no_grad()
def write(p: Tensor, own: Tensor) -> None:  # (m, r), (count, r)
    """Set a factor's own rows."""
    local(p).copy_(own)


@torch.no_grad()
def write_whole(p: Tensor, values: Tensor) -> None:  # (m, *), (m, *)
    """Set a parameter from all its rows, which this process has."""
    rows = rows_of(p) if p.ndim else None
    local(p).copy_(values if rows is None else values[rows.first : rows.first + rows.count])
