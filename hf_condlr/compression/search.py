"""The largest compression within a drop of quality, by bisection: `max_drop`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hf_condlr.errors import ConfigError

LEAST = 0.01  # the smallest ratio: nearly the largest ranks whose factors are smaller than the weights
BISECTIONS = 6  # leave an interval of 1/2⁶ = 1.6 points


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
    measure: Callable[[int, float], Point],
    unbounded: Callable[[float], Point] | None,
    most: float,
    max_drop: float,
    metric: str,
) -> tuple[float, list[Point]]:
    """Try the smallest ratio; if it fits, bisect between it and the largest possible one.

    Quality is taken to fall with the ratio. The answer was measured itself and is within `max_drop`, as is every
    smaller ratio that was tried; the next larger one that was tried is not. Where the smallest one loses too much
    already, it is measured once more without a bound on κ. With a bound all layers are factored (of a square one at
    most 0.41 of the rank is left), without one they stay dense where that is better.

    Args:
        measure: Compresses at a ratio, for the number of the evaluation; a quality that is not a number counts as too
            low.
        unbounded: The same with τ = ∞; None if there is no bound.
        most: The largest possible ratio.
        max_drop: Most that the quality may fall.
        metric: Name of the quality, for messages.

    Returns:
        The ratio, and all points in the order of their ratios.

    Raises:
        ConfigError: The smallest ratio is not within `max_drop`.
    """

    def fits(point: Point) -> bool:
        return point.drop is not None and math.isfinite(point.drop) and point.drop <= max_drop

    low, high = min(LEAST, most), most
    points = [measure(0, low)]
    if not fits(points[0]):
        received = f"a fall {_said(points[0])} at {low:g}, the least that is removed"
        remedy = "Raise max_drop, or exclude_modules from the conversion."
        if unbounded is not None:
            received += f", and {_said(free := unbounded(low))} where tau=inf lets layers stay dense"
            if fits(free):
                remedy = "Leave layers dense: with exclude_modules, or all that should be with tau=inf."
        rule = f"max_drop must leave a ratio whose {metric} falls by at most {max_drop:g}"
        remedy += " Or give a ratio, and let recovery_steps make the loss good."
        raise ConfigError(rule, received=received, remedy=remedy)
    for number in range(1, BISECTIONS + 1):
        middle = math.floor((low + high) / 2 * 1e4) / 1e4  # few digits, and none above `most`
        points.append(measure(number, middle))
        low, high = (middle, high) if fits(points[-1]) else (low, middle)
    return low, sorted(points, key=lambda point: point.ratio)


def _said(point: Point) -> str:
    return "that is not a number" if point.drop is None else f"of {point.drop:.2f}"
