"""The rank of each layer that a config asks for."""

from __future__ import annotations

import logging
import math

from peft.utils.other import get_pattern_key
from torch import Tensor

from hf_condlr.config import CondLRConfig
from hf_condlr.conversion.factorizations import spectral_energy
from hf_condlr.conversion.rank_budget import (
    allocate_by_energy,
    allocate_uniform,
    break_even_rank,
    round_down,
)
from hf_condlr.conversion.report import (
    ConversionReport,
)
from hf_condlr.conversion.starts import NO_MOMENTS, Moments, in_metric
from hf_condlr.conversion.targets import Place
from hf_condlr.errors import ConfigError

logger = logging.getLogger(__name__)


def requested_ranks(
    matrices: dict[str, Tensor],
    targets: dict[str, Place],
    config: CondLRConfig,
    moments: dict[str, Moments],
    report: ConversionReport,
) -> dict[str, int]:
    """The rank of every layer to convert. Those that stay dense under a budget go to the report."""
    ranks: dict[str, int] = {}
    budgeted: dict[str, tuple[int, int]] = {}
    for name, W in matrices.items():
        value = _explicit_rank(name, config, is_head=targets[name] == "head")
        if value is None:
            budgeted[name] = (W.shape[0], W.shape[1])
            continue
        full = min(W.shape)
        if isinstance(value, int) and value > full:
            raise ConfigError(
                f"the rank of {name!r} is at most min(in, out) = {full}",
                received=f"r={value}",
                remedy="Lower r, give rank_ratio instead, or set the layer apart in rank_pattern.",
            )
        if not isinstance(value, int):
            value = max(1, math.floor(value * full + 0.5))
            value = full if value == full else round_down(value, config.rank_multiple)
        ranks[name] = value
    _warn_where_larger(matrices, ranks)
    if not budgeted:
        return ranks
    assert config.compression_ratio is not None
    if config.rank_allocation == "uniform":
        allocated = allocate_uniform(budgeted, config.compression_ratio, config.rank_multiple)
    else:
        energies = {n: spectral_energy(in_metric(matrices[n], *moments.get(n, NO_MOMENTS))) for n in budgeted}
        ratio, multiple = config.compression_ratio, config.rank_multiple
        # What stays dense has no bound on κ; and where the error is a loss, no layer needs to be spared.
        leave_dense = config.rank_allocation == "energy"
        allocated = allocate_by_energy(budgeted, energies, ratio, multiple, leave_dense=leave_dense)
    report.skipped |= {n: "its factors would not be smaller" for n, r in allocated.items() if r is None}
    ranks |= {name: r for name, r in allocated.items() if r is not None}
    return {name: ranks[name] for name in matrices if name in ranks}


def _explicit_rank(name: str, config: CondLRConfig, *, is_head: bool) -> float | None:
    """int a rank, float a rank ratio, None: from the budget."""
    value = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), name))
    if value is not None:
        return value
    if is_head and config.head == "full_rank":
        return 1.0
    return config.r if config.r is not None else config.rank_ratio


def _warn_where_larger(matrices: dict[str, Tensor], ranks: dict[str, int]) -> None:
    larger = [name for name, r in ranks.items() if r > break_even_rank(*matrices[name].shape)]
    if larger:
        logger.warning("factors are not smaller than the weight they replace in: %s", ", ".join(larger))
