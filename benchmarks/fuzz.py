"""Random cases against the manifold step: models, optimizers, gradients of every bad kind, factors that others change.

`hypothesis` draws a case, runs it, checks the invariants of `fuzz_cases.py` after each of its steps, and shrinks a
case that fails to the smallest one that still does, printed as code. No state is kept between calls.

    python -m benchmarks.fuzz
"""

from __future__ import annotations

import collections
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, configuration, given, seed, settings
from hypothesis import strategies as st

from benchmarks import fuzz_cases
from benchmarks.fuzz_cases import CORES, GRADIENTS, INF, OPTIMIZERS, Case, Do, Layer, Step
from hf_condlr.options import option
from studies.record import parse, set_up, write_record

TAUS = (0.0, 1e-7, 1e-3, 0.1, 1.0, 30.0, 1e5, INF)
RATES = (1e-6, 1e-3, 1e-2, 0.1, 1.0, 10.0, 1e4, 1e10, 1e20, 1e30)
LONGEST = 40  # events of a case
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir(), "hypothesis"))  # its caches, not in the tree


@dataclass
class Options:
    """How many steps, and from which seed."""

    steps: int = option(100_000, "Least number of optimizer steps.")
    seed: int = option(0, "Seed of the first hundred cases; the next hundred have the next seed.")
    output: str = option("outputs/fuzz.json", "Where the counts go.")


@st.composite
def layers(draw: Any) -> Layer:
    """Tall, wide, square; rank one to full; equal shapes are likely, and are stepped as one stack."""
    m, n = draw(st.sampled_from([(8, 8), (8, 8), (16, 4), (4, 16), (5, 1), (1, 5), (1, 1), (12, 12)]))
    kind = draw(st.sampled_from(["linear", "linear", "conv1d", "conv2d"]))
    kernel = draw(st.sampled_from([1, 2, 3])) if kind == "conv2d" else 0
    full = min(m, n * max(kernel, 1) ** 2)
    r = draw(st.sampled_from(sorted({max(1, full // 2), 1, full})))
    tau, core = draw(st.sampled_from(TAUS)), draw(st.sampled_from(["as it is", *CORES]))
    return Layer(m, n, r, tau, kernel, kind == "conv1d", core, not kernel and draw(st.booleans()))


def steps(most: int) -> st.SearchStrategy[Step]:
    """One step in four has gradients of one bad kind in all factors, the others in at most two factors."""
    kinds = st.sampled_from(list(GRADIENTS))
    others = st.lists(st.tuples(st.integers(0, 11), kinds), max_size=2).map(tuple)
    times = st.sampled_from([n for n in (1, 2, 10, 40) if n <= most])  # to draw a case costs as much as ten steps
    return st.builds(Step, st.integers(0, 2**16), st.one_of(*3 * [st.just("normal")], kinds), others, times)


def doings() -> st.SearchStrategy[Do]:
    """What happens between two steps."""
    number = st.integers(0, 11)
    return st.one_of(
        st.builds(Do, st.sampled_from(["settle", "keep", "reload", "return", "freeze", "bases", "data"]), number),
        st.builds(Do, st.just("tau"), number, st.sampled_from(TAUS)),
        st.builds(Do, st.just("lr"), number, st.sampled_from(RATES)),
        st.builds(Do, st.just("write"), number, st.sampled_from(list(CORES))),
    )


@st.composite
def cases(draw: Any, most: int) -> Case:
    """A complete case, in which a step is repeated at most `most` times."""
    step, least = steps(most), draw(st.sampled_from([1, 5, 15]))
    return Case(
        layers=tuple(draw(st.lists(layers(), min_size=1, max_size=3))),
        events=tuple(draw(st.lists(st.one_of(*5 * [step], doings()), min_size=least, max_size=LONGEST))),
        optimizer=draw(st.sampled_from(list(OPTIMIZERS))),
        lr=draw(st.sampled_from(RATES)),
        weight_decay=draw(st.sampled_from([0.0, 0.01])),
        center=draw(st.sampled_from(["nearest", "rms", "mean"])),
        warmup_steps=draw(st.sampled_from([0, 1, 7, 30])),
        interval=draw(st.sampled_from([1, 1, 2, 5])),
        metric_scaling=draw(st.sampled_from([None, True, False])),
        double=draw(st.sampled_from([False, False, False, True])),
        ahead=draw(st.sampled_from([False, False, False, False, True])),  # costs three times as much
    )


def fuzz(examples: int, *, start: int | None, then: Callable[[fuzz_cases.Run], None], most: int = 40) -> None:
    """Run `examples` cases of the seed `start`, with None always the same ones; raise at the first that fails."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=start is None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        phases=[Phase.generate, Phase.shrink],  # to explain a failure takes minutes
    )
    @given(cases(most))
    def run_one(case: Case) -> None:
        then(fuzz_cases.run(case))

    (run_one if start is None else seed(start)(run_one))()


def main() -> None:
    """Case after case until there were enough steps."""
    (options,) = parse(Options)
    set_up(threads=1)
    logging.disable(logging.WARNING)  # the step warns of each factor that it holds
    counts: collections.Counter[str] = collections.Counter()

    def count(run: fuzz_cases.Run) -> None:
        counts.update(cases=1, steps=run.steps, refused=run.refused)
        counts[f"steps of {run.case.optimizer}"] += run.steps
        counts["steps as on a GPU"] += run.steps * run.case.ahead

    start, began = options.seed, time.perf_counter()
    while counts["steps"] < options.steps:
        fuzz(100, start=start, then=count)
        start += 1  # the same seed would draw the same cases again
        found = {"counts": dict(counts), "seconds": time.perf_counter() - began}
        path = write_record(options.output, found, options)  # after each hundred, in case it is ended here
    print(*(f"{name}: {number}" for name, number in counts.items()), f"wrote {path}", sep="\n")


if __name__ == "__main__":
    main()
