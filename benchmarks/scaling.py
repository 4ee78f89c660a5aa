"""How the manifold step grows with rank, width and number of layers, beside what its operations predict.

Timed is `optimizer.step()` of SGD with the manifold step attached, less that of SGD alone on the same layers, the least
of all rounds; every step starts from the same factors, whose cores are outside of the bound, so that all are clipped.
The leading term of the operations is 8(m + n)r² a layer, with an O(r³) for the cores. Growth is the slope of log(time)
over log(size) by least squares, of each round by itself: its median and spread.

    python -m benchmarks.scaling
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.timing import CommonOptions, any_device, run, seconds, spread
from hf_condlr import LowRankLinear, attach_manifold_step
from hf_condlr.tables import markdown_table
from studies.record import option

NAMES = {"rank": "rank r", "width": "width m = n", "count": "layers"}
CUBIC = {"rank": "3", "width": "0", "count": "1"}


@dataclass
class Options(CommonOptions):
    """What is measured: square layers of `width`, `rank` and number `layers`, one of the three varied at a time."""

    width: int = option(768, "m = n where it is not varied.")
    rank: int = option(96, "r where it is not varied.")
    layers: int = option(8, "Number of layers where it is not varied.")
    ranks: list[int] = option([48, 96, 192, 384], "Varied.")
    widths: list[int] = option([384, 768, 1536, 3072], "Varied.")
    numbers: list[int] = option([4, 8, 16, 32], "Numbers of layers, varied.")
    tau: float = option(0.1, "Conditioning tolerance.")
    rounds: int = option(7, "Interleaved repetitions; medians are printed.")


class Case:
    """Layers of one size, with gradients, under SGD with the manifold step and under SGD alone."""

    def __init__(self, width: int, rank: int, count: int, tau: float, device: torch.device) -> None:
        self.operations = count * 8 * (width + width) * rank**2
        layers = [LowRankLinear(width, width, rank, False, tau=tau, device=device) for _ in range(count)]
        model = nn.ModuleList(layers)
        self.device, self.parameters = device, list(model.parameters())
        with torch.no_grad():
            for layer in layers:
                layer.S.mul_(torch.linspace(1, 1 + 3 * tau, rank, device=device))  # orthogonal before: κ = 1 + 3τ
                layer.refresh_bound()
        self.plain = torch.optim.SGD(self.parameters, lr=1e-3)
        self.constrained = torch.optim.SGD(self.parameters, lr=1e-3)
        attach_manifold_step(self.constrained, model)
        self.start = [p.detach().clone() for p in self.parameters]
        self.gradients = [torch.randn_like(p) / p.shape[0] ** 0.5 for p in self.start]

    def timed(self, step: Callable[[], Any]) -> float:
        """Seconds of one step from the start."""
        for p, value, gradient in zip(self.parameters, self.start, self.gradients, strict=True):
            p.data.copy_(value)
            p.grad = gradient.clone()
        return seconds(step, self.device)

    def round(self) -> tuple[float, float]:
        """Seconds of a step with the manifold step and of one without."""
        return self.timed(self.constrained.step), self.timed(self.plain.step)


def slope(sizes: Any, values: Any) -> float:
    """Of log(value) over log(size), by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def measure(options: Options) -> dict[str, dict[str, Any]]:
    """{what is varied: its sizes, operations and seconds, rounds × sizes}."""
    base = {"width": options.width, "rank": options.rank, "count": options.layers}
    varied = {"rank": options.ranks, "width": options.widths, "count": options.numbers}
    results = {}
    for what, sizes in varied.items():
        cases = [Case(**base | {what: size}, tau=options.tau, device=any_device()) for size in sizes]
        rounds = [[case.round() for case in cases] for _ in range(options.rounds + 1)][1:]  # the first one warms up
        plain = [min(turn[i][1] for turn in rounds) for i in range(len(cases))]
        results[what] = {
            "sizes": sizes,
            "operations": [case.operations for case in cases],
            "seconds": [[both[0] - least for both, least in zip(turn, plain, strict=True)] for turn in rounds],
        }
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """Each size, and the growth."""
    points, growth = [], []
    for what, result in results.items():
        for i, size in enumerate(result["sizes"]):
            times = [row[i] for row in result["seconds"]]
            rate = result["operations"][i] / statistics.median(times) / 1e9
            points.append([NAMES[what], size, spread([1e3 * t for t in times], 1), f"{rate:.1f}"])
        measured = [slope(result["sizes"], row) for row in result["seconds"]]
        predicted = slope(result["sizes"], result["operations"])
        growth.append([NAMES[what], spread(measured), f"{predicted:.2f}", CUBIC[what]])
    first = markdown_table(["varied", "size", "ms", "8(m + n)r² in 10⁹ a second"], points)
    return f"{first}\n\n{markdown_table(['grows with', 'slope', 'of 8(m + n)r²', 'of r³'], growth)}"


if __name__ == "__main__":
    run(Options, measure, table)
