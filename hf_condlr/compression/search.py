"""The largest compression within a drop of quality, by bisection: `max_drop`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hf_condlr.errors import ConfigError, require

EVALUATIONS = 6  # leave an interval of 1/2⁶ = 1.6 points


@dataclass
class Point:
    """A compression that was tried: nothing was trained after it."""

    ratio: float
    parameters: int
    """Of the full model, in U, S and V."""
    quality: float | None
    """On the rows that choose the ratio; None if it was not a number."""
    drop: float | None
    """Points of accuracy, or percent of the perplexity, that it costs."""
    largest_kappa: float


def largest_ratio(
    measure: Callable[[int, float], Point], most: float, max_drop: float, metric: str
) -> tuple[float, list[Point]]:
    """Bisect between no compression, which costs nothing, and the largest possible one.

    Quality is taken to fall with the ratio. The answer was measured itself and is within `max_drop`, as is every
    smaller ratio that was tried; the next larger one that was tried is not.

    Args:
        measure: Compresses at a ratio, for the number of the evaluation; a quality that is not a number counts as too
            low.
        most: The largest possible ratio.
        max_drop: Most that the quality may fall.
        metric: Name of the quality, for messages.

    Returns:
        The ratio, and all points in the order of their ratios.

    Raises:
        ConfigError: No ratio that was tried is within `max_drop`.
    """
    low, high = 0.0, most
    points: list[Point] = []
    for number in range(EVALUATIONS):
        middle = math.floor((low + high) / 2 * 1e4) / 1e4  # few digits, and none above `most`
        point = measure(number, middle)
        points.append(point)
        fits = point.drop is not None and math.isfinite(point.drop) and point.drop <= max_drop
        low, high = (middle, high) if fits else (low, middle)
    points.sort(key=lambda point: point.ratio)
    tried = ", ".join(f"{point.ratio:g}: {_said(point.drop)}" for point in points)
    rule = f"max_drop must leave a ratio whose {metric} falls by at most {max_drop:g}"
    remedy = "Raise max_drop or tau, or give a ratio and let recovery_steps make the loss good."
    require(low > 0, rule, received=f"drops of {tried}", remedy=remedy, error=ConfigError)
    return low, points


def _said(drop: float | None) -> str:
    return "not a number" if drop is None else f"{drop:.2f}"
