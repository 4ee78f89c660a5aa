"""The rank of each layer that a config asks for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator

from peft.utils.other import get_pattern_key
from torch import Tensor

from hf_condlr.config import CondLRConfig
from hf_condlr.conversion.rank_budget import Ranks, allocate_by_energy, allocate_uniform, break_even_rank, round_down
from hf_condlr.errors import ConfigError, listed, require

logger = logging.getLogger(__name__)

Energies = Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]]
"""Names of layers -> pairs of a name and the layer's σ_i², descending, in the metric that errors are measured in."""


def requested_ranks(
    matrices: dict[str, Tensor], heads: set[str], config: CondLRConfig, energies: Energies
) -> tuple[dict[str, int], dict[str, str]]:
    """The rank of every layer to convert, and the layers that stay dense under a budget, with the reason.

    Raises:
        ConfigError: A rank exceeds a layer's, or the budget cannot be met.
    """
    found = {name: _explicit_rank(name, min(W.shape), config, name in heads) for name, W in matrices.items()}
    explicit = {name: r for name, r in found.items() if r is not None}
    form = config.compression_form
    least_useless = {name: break_even_rank(W.shape[0], W.shape[1], form) + 1 for name, W in matrices.items()}
    if larger := [name for name, r in explicit.items() if r >= least_useless[name]]:
        logger.warning(
            "factors are not smaller than the weight they replace in: %s; compression_ratio chooses ranks that save "
            "weights, which for a square layer are those below rank_ratio=%s",
            listed(larger),
            {"training": "0.41", "folded": "0.5", "pivoted": "1"}[form],
        )
    budgeted = {name: W for name, W in matrices.items() if name not in explicit}
    ranks: Ranks = {**explicit, **(_allocate(budgeted, config, energies) if budgeted else {})}
    left_dense = {name: "its factors would not be smaller" for name, r in ranks.items() if r is None}
    return {name: r for name in matrices if (r := ranks[name]) is not None}, left_dense


def _explicit_rank(name: str, full: int, config: CondLRConfig, is_head: bool) -> int | None:
    """The rank that the config states for a layer, as a rank or a ratio; None if it comes from the budget."""
    value = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name))
    if value is None and is_head and config.head == "full_rank":
        return full
    if value is None:
        value = config.rank_ratio if config.r is None else config.r
    if isinstance(value, int):
        rule = f"the rank of {name!r} is at most min(in, out) = {full}"
        remedy = "Lower r, give rank_ratio instead, or name the layer in rank_pattern."
        require(value <= full, rule, received=f"r={value}", remedy=remedy, error=ConfigError)
    if value is None or isinstance(value, int):
        return value
    r = max(1, math.floor(value * full + 0.5))
    return full if r == full else round_down(r, config.rank_multiple)


def _allocate(matrices: dict[str, Tensor], config: CondLRConfig, energies: Energies) -> Ranks:
    assert config.compression_ratio is not None
    shapes = {name: (W.shape[0], W.shape[1]) for name, W in matrices.items()}
    ratio, multiple, form = config.compression_ratio, config.rank_multiple, config.compression_form
    if config.rank_allocation == "uniform":
        return allocate_uniform(shapes, ratio, multiple, form=form)
    # A dense layer has no bound on κ, which whoever asks for one would miss.
    leave_dense = config.rank_allocation == "energy" or math.isinf(config.tau)
    found = dict(energies(matrices))
    return allocate_by_energy(shapes, found, ratio, multiple, form=form, leave_dense=leave_dense)
