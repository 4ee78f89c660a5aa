"""Ranks from a budget: `compression_ratio` spread uniformly, or where truncation costs least.

A layer (m, n) of rank r has r(m + n) + r² weights in the training form, r(m + n) folded and r(m + n − r) pivoted. It
stays dense where that is not less than mn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_condlr.config import CompressionForm
from hf_condlr.errors import ConfigError, require
from hf_condlr.layers.record import factored_size

Shapes = dict[str, tuple[int, int]]

Ranks = dict[str, int | None]  # None: the layer stays dense


def break_even_rank(m: int, n: int, form: CompressionForm = "training") -> int:
    """The largest r whose factors are smaller than mn; 0 where even rank 1 does not pay.

    About 0.41 n for a square layer in the training form, below 0.5 n folded; any but the full one pivoted.
    """
    if form == "pivoted":
        return min(m, n) - 1  # r(m + n − r) < mn ⇔ (m − r)(n − r) > 0
    if form == "folded":
        return (m * n - 1) // (m + n)
    return (math.isqrt((m + n) ** 2 + 4 * m * n - 1) - (m + n)) // 2  # (2r + m + n)² < (m + n)² + 4mn


def round_down(r: int, multiple: int) -> int:
    """The largest multiple of `multiple` up to r; r itself if it is smaller than `multiple`."""
    return r if r < multiple else r - r % multiple


def allocate_uniform(
    shapes: Shapes, compression_ratio: float, multiple: int = 1, *, form: CompressionForm = "training"
) -> Ranks:
    """The largest common rank ratio within the budget; single ranks are added while more than 1 % of it is unused.

    With `multiple`, ranks not smaller than it are its multiples, and grow by `multiple`.

    Raises:
        ConfigError: Rank 1 everywhere exceeds the budget.
    """
    budget = _budget(shapes, compression_ratio, form)

    def ranks_at(ratio: float) -> Ranks:
        chosen = {name: round_down(max(1, round(ratio * min(shape))), multiple) for name, shape in shapes.items()}
        return {name: r if r <= break_even_rank(*shapes[name], form) else None for name, r in chosen.items()}

    low, high = 0.0, 1.0
    for _ in range(40):  # the size steps at ratios that are multiples of 1/(2 min(m, n))
        middle = (low + high) / 2
        low, high = (middle, high) if _size(shapes, ranks_at(middle), form) <= budget else (low, middle)
    ranks = ranks_at(low)
    if _size(shapes, ranks, form) < 0.99 * budget:
        gains = {name: [1 / min(shape)] * min(shape) for name, shape in shapes.items()}
        _spend(shapes, ranks, budget, gains, multiple, form)
    return ranks


def allocate_by_energy(
    shapes: Shapes,
    energies: dict[str, Tensor],
    compression_ratio: float,
    multiple: int = 1,
    *,
    form: CompressionForm = "training",
    leave_dense: bool = True,
) -> Ranks:
    """Ranks that minimise Σ_layers Σ_{i>r} σ_i², the summed squared truncation error, within the budget.

    For a multiplier λ every layer minimises its own tail + λ · size; the least λ whose ranks fit is optimal for the
    size it has (Everett 1963). What is left of the budget goes to the single ranks that gain most for their size.

    Args:
        shapes: (m, n) of each layer.
        energies: σ_i² of each layer in descending order, in the metric that the error is measured in.
        compression_ratio: Share of Σ mn to remove.
        multiple: Ranks not smaller than this are multiples of it.
        form: The form that sizes are counted in.
        leave_dense: Whether a layer may stay dense, at its full size and without a bound on κ, even where a rank pays.

    Raises:
        ConfigError: Rank 1 everywhere exceeds the budget.
    """
    budget = _budget(shapes, compression_ratio, form)
    options = {name: _options(shape, energies[name], multiple, form, leave_dense) for name, shape in shapes.items()}

    def ranks_at(multiplier: float) -> Ranks:
        return {
            name: ranks[int((tails + multiplier * sizes).argmin())] for name, (ranks, sizes, tails) in options.items()
        }

    low, high = 0.0, max(float(energy.sum()) for energy in energies.values()) or 1.0  # high: rank 1 is best everywhere
    if _size(shapes, ranks_at(low), form) <= budget:
        return ranks_at(low)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if _size(shapes, ranks_at(middle), form) <= budget else (middle, high)
    ranks = ranks_at(high)
    _spend(shapes, ranks, budget, {name: energy.tolist() for name, energy in energies.items()}, multiple, form)
    return ranks


def _options(
    shape: tuple[int, int], energy: Tensor, multiple: int, form: CompressionForm, leave_dense: bool
) -> tuple[list[int | None], Tensor, Tensor]:
    """Choices for a layer: the ranks, their sizes and the tails of the spectrum they leave, dense last."""
    m, n = shape
    ranks: list[int | None] = [r for r in range(1, break_even_rank(m, n, form) + 1) if r == round_down(r, multiple)]
    if leave_dense or not ranks:
        ranks.append(None)
    sizes = [m * n if r is None else factored_size(m, n, r, form) for r in ranks]
    remaining = energy.double().flip(0).cumsum(0).flip(0)  # Σ_{i≥k} σ_i², k from 0; 0 after the last one, and if dense
    tails = torch.cat((remaining, remaining.new_zeros(1)))[[-1 if r is None else r for r in ranks]]
    return ranks, torch.tensor(sizes, dtype=torch.float64), tails


def _spend(
    shapes: Shapes, ranks: Ranks, budget: int, gains: dict[str, list[float]], multiple: int, form: CompressionForm
) -> None:
    """Add ranks in place, the largest gain per weight first, until none fits. gains[name][r] is that of r → r + 1.

    Ranks grow by 1 up to `multiple`, then by `multiple`.
    """
    left = budget - _size(shapes, ranks, form)
    while True:
        candidates: list[tuple[float, int, str, int]] = []  # gain per weight, weights, layer, rank
        for name, r in ranks.items():
            larger = 0 if r is None else r + (1 if r < multiple else multiple)
            if r is None or larger > break_even_rank(*shapes[name], form):
                continue
            cost = factored_size(*shapes[name], larger, form) - factored_size(*shapes[name], r, form)
            if cost <= left:
                candidates.append((sum(gains[name][r:larger]) / cost, cost, name, larger))
        if not candidates:
            return
        _, cost, name, ranks[name] = max(candidates, key=lambda candidate: candidate[0])
        left -= cost


def largest_compression(shapes: Shapes, form: CompressionForm = "training") -> float:
    """The largest compression_ratio: rank 1 in every layer where that is smaller than the weight."""
    return 1 - _least(shapes, form) / sum(m * n for m, n in shapes.values())


def _least(shapes: Shapes, form: CompressionForm) -> int:
    return sum(min(m * n, factored_size(m, n, 1, form)) for m, n in shapes.values())


def _budget(shapes: Shapes, compression_ratio: float, form: CompressionForm) -> int:
    total = sum(m * n for m, n in shapes.values())
    budget = math.floor((1 - compression_ratio) * total)
    most = largest_compression(shapes, form)
    rule = f"compression_ratio must leave at least rank 1 in every layer, here at most {most:.4f}"
    remedy = "Lower it, or leave small layers out with exclude_modules."
    require(_least(shapes, form) <= budget, rule, received=compression_ratio, remedy=remedy, error=ConfigError)
    return budget


def _size(shapes: Shapes, ranks: Ranks, form: CompressionForm) -> int:
    return sum(m * n if (r := ranks[name]) is None else factored_size(m, n, r, form) for name, (m, n) in shapes.items())
