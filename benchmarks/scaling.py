"""How the manifold step grows with rank, width and number of layers, beside what its operations predict.

Timed is `optimizer.step()` of SGD with the manifold step attached, less the work of SGD alone on the same layers; every
step starts from the same factors, whose cores are outside of the bound, so that all are clipped.
The leading term of the operations is 8(m + n)r² a layer, with an O(r³) for the cores. Growth is the slope of log(time)
over log(size) by least squares, of each round by itself: its median and spread.

    python -m benchmarks.scaling
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.manifold_step import Case
from benchmarks.timing import CommonOptions, any_device, in_turn, run, spread
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
    ranks: list[int] = option([48, 96, 192, 384], "Values of r.")
    widths: list[int] = option([384, 768, 1536, 3072], "Values of m = n.")
    numbers: list[int] = option([4, 8, 16, 32], "Values of the number of layers.")
    tau: float = option(0.1, "Conditioning tolerance.")
    rounds: int = option(7, "Interleaved repetitions; medians are printed.")


def slope(sizes: Any, values: Any) -> float:
    """Slope of log(value) over log(size), by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def case_of(width: int, rank: int, count: int, tau: float) -> Case:
    """Square layers of one size, whose cores have κ = 1 + 3τ at the start."""
    case = Case([(width, width, rank)] * count, tau, any_device())
    for start in case.start:
        if start.shape == (rank, rank):  # orthogonal before
            start.mul_(torch.linspace(1, 1 + 3 * tau, rank, device=start.device))
    return case


def measure(options: Options) -> dict[str, dict[str, Any]]:
    """{what is varied: its sizes, operations and seconds, rounds × sizes}."""
    base = {"width": options.width, "rank": options.rank, "count": options.layers}
    varied = {"rank": options.ranks, "width": options.widths, "count": options.numbers}
    results = {}
    for what, sizes in varied.items():
        settings = [base | {what: size} for size in sizes]
        cases = {str(x): case_of(**x, tau=options.tau) for x in settings}
        times = in_turn({label: lambda case=case: case.every(1) for label, case in cases.items()}, options.rounds)
        results[what] = {
            "sizes": sizes,
            "operations": [x["count"] * 8 * 2 * x["width"] * x["rank"] ** 2 for x in settings],
            "seconds": list(zip(*times.values(), strict=True)),
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
