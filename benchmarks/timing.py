"""What the benchmarks share: their common options, their `main`, interleaved timing, ratios."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_condlr.options import option
from studies.record import parse, set_up, write_record


@dataclass
class CommonOptions:
    """What every benchmark takes."""

    rounds: int = option(5, "Interleaved repetitions; medians are printed.")
    threads: int = option(1, "Threads of torch on a CPU.")
    output: str = option("", "Where the record goes; outputs/NAME.json if not given.")


def run(options_class: type, measure: Callable[[Any], Iterator[Any]], table: Callable[[Any], str]) -> None:
    """The `main` of a benchmark: measure, print the table, write `results` and how they were made.

    `measure` yields more and more complete results. Each time the record is written: one that is killed leaves what it
    had, with the table.
    """
    (options,) = parse(options_class)
    set_up(options.threads)
    torch.manual_seed(0)
    name = sys.modules[options_class.__module__].__spec__.name.rpartition(".")[2]
    for results in measure(options):
        record = {"results": results, "table": table(results)}
        path = write_record(options.output or f"outputs/{name}.json", record, options)
    print(f"{record['table']}\n\nwrote {path}")


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Time of one call, the device's work included.

    On a CPU with one thread, the time of the process: what others do on a shared machine then moves it far less.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = clock()
    call()
    wait()
    return clock() - start


def in_turn(calls: dict[str, Callable[[], float]], rounds: int, longest: float | None = None) -> dict[str, list[float]]:
    """What each call returns, `rounds` of each in turn, after one that warms up.

    Of a call that took more than `longest` seconds when it warmed up, that is the only value.
    """
    first = {name: call() for name, call in calls.items()}
    values = {name: [value] if longest and value > longest else [] for name, value in first.items()}
    repeated = [name for name in calls if not values[name]]
    for _ in range(rounds):
        for name in repeated:
            values[name].append(calls[name]())
    return values


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` of each in turn, after one that warms up."""
    return in_turn({name: lambda call=call: seconds(call, device) for name, call in calls.items()}, rounds)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (least … most)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} … {max(values):.{digits}f})"


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round, so that a machine that was slow for a while was slow for both."""
    return [a / b for a, b in zip(values, base, strict=True)]
