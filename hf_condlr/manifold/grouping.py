"""Which factors of a model go into one stack."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from hf_condlr.distributed.rows import layout
from hf_condlr.layers import LowRankLayer
from hf_condlr.manifold.bases import BasisStack
from hf_condlr.manifold.cores import CoreStack
from hf_condlr.manifold.stack import has_gradient

# Entries of one stack at most: four temporaries of its size are alive at once, beside one copy of all factors. A GPU
# wants few launches, a CPU stacks that fit its cache.
STACK_LIMIT = {"cpu": 2**18, "others": 2**22}


def moving_factors(layers: dict[str, LowRankLayer], *, all_cores: bool = False) -> tuple:
    """What stacks depend on: which factors have a gradient, which S train, or move with their bound. To compare."""
    return tuple(
        (
            *((id(p), p.dtype, p.device, has_gradient(p)) for p in (x.U, x.S, x.V)),
            *(x.S.requires_grad, all_cores or x.S.requires_grad, x.tau, x.center),
        )
        for x in layers.values()
    )


def basis_stacks(layers: dict[str, LowRankLayer]) -> list[BasisStack]:
    """The trainable U and V that have a gradient, stacked by shape, dtype and device."""
    rows = (
        (f"{name}.{kind}", p, layer.S, not layer.S.requires_grad)
        for name, layer in layers.items()
        for kind, p in (("U", layer.U), ("V", layer.V))
        if has_gradient(p)
    )
    return [BasisStack(names, ps, cores, flags[0]) for names, ps, cores, flags in _grouped(rows)]


def core_stacks(
    layers: dict[str, LowRankLayer], initial_condition: dict[str, float], *, all_cores: bool = False
) -> list[CoreStack]:
    """The trainable S, or all of them, stacked by shape, dtype, device and what `CoreStack` asks of its members."""
    rows = (
        (name, S, (initial_condition[name], 1 + layer.tau), (layer.center, math.isinf(layer.tau), has_gradient(S)))
        for name, layer in layers.items()
        for S in (layer.S,)
        if all_cores or S.requires_grad
    )
    stacks: list[CoreStack] = []
    for names, ps, schedule, keys in _grouped(rows):
        stacks.append(CoreStack(names, ps, schedule, keys[0][0], sum(len(stack.layers) for stack in stacks)))
    return stacks


def _grouped(rows: Iterable[tuple]) -> Iterator[tuple[list, ...]]:
    """Rows (name, parameter, ..., key) with equal shape, dtype, device, sharding and key, transposed to lists.

    Groups of more than `STACK_LIMIT` entries are split.
    """
    groups: dict[tuple, list[tuple]] = {}
    for row in rows:
        p = row[1]
        groups.setdefault((p.shape, p.dtype, p.device, layout(p), row[-1]), []).append(row)
    for group in groups.values():
        p = group[0][1]
        size = max(1, STACK_LIMIT.get(p.device.type, STACK_LIMIT["others"]) // p.numel())
        for i in range(0, len(group), size):
            yield tuple(list(column) for column in zip(*group[i : i + size], strict=True))
