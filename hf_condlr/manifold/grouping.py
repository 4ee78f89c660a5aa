"""Which factors of a model go into one stack."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from hf_condlr.distributed.shards import layout
from hf_condlr.layers import LowRankLayer
from hf_condlr.manifold.bases import BasisStack
from hf_condlr.manifold.cores import CoreStack
from hf_condlr.manifold.stack import Stack, has_gradient

STACK_LIMIT = {"cpu": 2**18, "others": 2**22}
"""Most entries of one stack: four temporaries of its size exist at once, besides one copy of all factors. A GPU is
fastest with few launches, a CPU with stacks that fit its cache."""


def grouping_key(layers: dict[str, LowRankLayer], *, all_cores: bool) -> tuple:
    """Key of all values that stacks depend on: the factors, which of them have a gradient or train, the tolerances."""
    return tuple(
        (
            *((id(p), p.dtype, p.device, has_gradient(p)) for p in (x.U, x.S, x.V)),
            *(x.S.requires_grad, all_cores or x.S.requires_grad, x.tau, x.center),
        )
        for x in layers.values()
    )


def tolerances(layers: dict[str, LowRankLayer]) -> list[tuple[float, str]]:
    """`tau` and `center` of each layer."""
    return [(layer.tau, layer.center) for layer in layers.values()]


def basis_stacks(layers: dict[str, LowRankLayer]) -> list[BasisStack]:
    """The U and V that have a gradient, stacked by shape, dtype and device."""
    rows = (
        (f"{name}.{kind}", p, layer.S, not layer.S.requires_grad)
        for name, layer in layers.items()
        for kind, p in (("U", layer.U), ("V", layer.V))
        if has_gradient(p)
    )
    return [BasisStack(names, ps, cores, flags[0]) for names, ps, cores, flags in _grouped(rows)]


def core_stacks(
    layers: dict[str, LowRankLayer], endpoints: dict[str, tuple[float, float]], *, all_cores: bool = False
) -> list[CoreStack]:
    """The S that train or have a gradient, or all, stacked by shape, dtype, device and what a `CoreStack` shares.

    Args:
        layers: The factored layers.
        endpoints: {layer: (κ_0, 1 + τ)}, see `BoundSchedule.endpoints`.
        all_cores: Take frozen cores, too.
    """
    rows = (
        (name, S, endpoints[name], (layer.center, math.isinf(layer.tau), has_gradient(S)))
        for name, layer in layers.items()
        for S in (layer.S,)
        if all_cores or S.requires_grad or has_gradient(S)
    )
    stacks: list[CoreStack] = []
    for names, ps, pairs, keys in _grouped(rows):
        stacks.append(CoreStack(names, ps, pairs, keys[0][0], sum(len(stack.names) for stack in stacks)))
    return stacks


def other_stacks(layers: dict[str, LowRankLayer], stacks: list[Stack]) -> list[Stack]:
    """Stack the factors that are in none of `stacks`: they must not move, which is checked."""
    taken = {id(p) for stack in stacks for p in stack.parameters}
    rows = (
        (f"{name}.{kind}", p, None)
        for name, layer in layers.items()
        for kind, p in (("U", layer.U), ("S", layer.S), ("V", layer.V))
        if id(p) not in taken
    )
    return [Stack(names, ps) for names, ps, _ in _grouped(rows)]


def _grouped(rows: Iterable[tuple]) -> Iterator[tuple[list, ...]]:
    """Rows (name, parameter, ..., key) of equal shape, dtype, device, sharding and key, as lists of columns.

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
