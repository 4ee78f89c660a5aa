"""The table of an experiment as Markdown, and how its numbers were made."""

import math
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import datasets
import torch
import transformers
from experiments import EXPERIMENTS
from methods import Method

import hf_condlr


def environment(*options: Any) -> dict[str, Any]:
    """Command, versions, kind of machine, and the fields of the dataclasses `options`."""
    modules = {"hf_condlr": hf_condlr, "torch": torch, "transformers": transformers, "datasets": datasets}
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return {
        "command": shlex.join(["python", "recipes/paper/table.py", *sys.argv[1:]]),
        "versions": {"python": platform.python_version(), **{n: m.__version__ for n, m in modules.items()}},
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads{gpu}",
        "options": {name: value for part in options for name, value in asdict(part).items()},
    }


def tables(experiment: str, results: dict[str, Any], rates: Sequence[float]) -> str:
    """Results over the seeds; a table for each attack with its budgets; the sweep; what to doubt."""
    rows = [row for row in results["rows"] if not row["diverged"]]
    parts = [f"# {experiment}", "Learning rate of each method by clean validation accuracy; mean ± standard deviation."]
    if rows:
        header = ["method", "rank ratio", "learning rate", "parameters", "clean %", "largest κ", "seeds"]
        parts.append(markdown(header, summary(rows)))
        for title, keys in columns(experiment).items():
            parts += [f"{title}, accuracy in %", robustness(rows, keys)]
    header = ["method", "rank ratio", *(f"{rate:g}" for rate in sorted(rates))]
    parts += ["Sweep: validation accuracy in %, first seed", markdown(header, sweep(results["sweep"], sorted(rates)))]
    return "\n\n".join([*parts, *doubts(results, rates)])


def columns(experiment: str) -> dict[str, dict[float, str]]:
    """{title: {budget: key in `robust_accuracy`}}: FGSM alone, as published; else each sample's worst case."""
    found: dict[str, dict[float, str]] = {}
    for attack in EXPERIMENTS[experiment].attacks:
        title, key = f"worst case of {attack.threat} attacks", f"worst {attack.threat}"
        if attack.name.startswith("fgsm"):
            title = key = attack.name
        found.setdefault(title, {})[attack.epsilon] = f"{key} {attack.epsilon:g}"
    return found


def robustness(rows: Iterable[dict[str, Any]], keys: dict[float, str]) -> str:
    """A line for each method, a column for each budget."""
    lines = [
        [*head(group[0]), *(spread([row["robust_accuracy"][key] for row in group]) for key in keys.values())]
        for group in groups(rows)
    ]
    return markdown(["method", "rank ratio", *(f"ε = {budget:g}" for budget in keys)], lines)


def groups(rows: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of the same line: its seeds, or the rates of its sweep."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["method"], row["rank_ratio"]), []).append(row)
    return list(found.values())


def head(row: dict[str, Any]) -> list[str]:
    """Method and rank ratio of a line."""
    return [Method.parse(row["method"]).label, "" if row["rank_ratio"] is None else f"{row['rank_ratio']:g}"]


def name(row: dict[str, Any]) -> str:
    """Both as running text."""
    label, ratio = head(row)
    return f"{label}, rank ratio {ratio}" if ratio else label


def summary(rows: Iterable[dict[str, Any]]) -> Iterable[list[str]]:
    """The main lines."""
    for group in groups(rows):
        kappa = [largest(row["condition_numbers"]) for row in group]
        clean = spread([row["clean_accuracy"] for row in group])
        size = f"{group[0]['parameters']:,}"
        yield [*head(group[0]), f"{group[0]['learning_rate']:g}", size, clean, f"{max(kappa):.4g}", f"{len(group)}"]


def sweep(rows: Iterable[dict[str, Any]], rates: Sequence[float]) -> Iterable[list[str]]:
    """Validation accuracy at each rate."""
    for group in groups(rows):
        found = {row["learning_rate"]: row for row in group}
        yield [
            *head(group[0]),
            *("diverged" if found[r]["diverged"] else f"{100 * found[r]['validation_accuracy']:.2f}" for r in rates),
        ]


def doubts(results: dict[str, Any], rates: Sequence[float]) -> list[str]:
    """Choices at the edge of the sweep, methods that diverged, and checks of the attacks that failed."""
    lines = []
    for choice in results["chosen"]:
        rate = choice["learning_rate"]
        if rate is None:
            lines.append(f"- {name(choice)}: diverged at every learning rate")
        elif len(rates) > 1 and rate in (min(rates), max(rates)):
            lines.append(f"- {name(choice)}: {rate:g} lies at the edge of the sweep, which is to be extended")
    for row in results["rows"]:
        failures = ["diverged"] if row["diverged"] else row["failed_checks"]
        lines += [f"- {name(row)}, seed {row['seed']}: {failure}" for failure in failures]
    return ["To doubt", "\n".join(lines)] if lines else []


def largest(condition_numbers: dict[str, float | None]) -> float:
    """Of all layers; inf where one is not finite."""
    return max(math.inf if value is None else value for value in condition_numbers.values())


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation, in percent."""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{deviation}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table; numbers to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])
