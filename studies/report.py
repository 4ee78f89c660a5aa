"""The tables of a study as Markdown, from the rows that `studies.rows.sweep` makes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from hf_condlr.robustness.attacks import Attack
from hf_condlr.tables import markdown_table
from studies.record import mean_and_spread


def tables(title: str, results: dict[str, Any], attacks: Sequence[Attack], rates: Sequence[float]) -> str:
    """Results over the seeds; a table for each attack with its budgets; the sweep; reasons for doubt."""
    rows = [row for row in results["rows"] if not row["diverged"]]
    parts = [f"# {title}", "Learning rate of each method by validation accuracy; mean ± standard deviation."]
    if rows:
        parts.append(summary_table(rows))
        for name, keys in columns(attacks).items():
            parts += [f"{name}, accuracy in %", _robustness(rows, keys)]
    parts.append(sweep_table(results["sweep"]))
    return "\n\n".join([*parts, *_doubts(results, rates)])


def columns(attacks: Sequence[Attack]) -> dict[str, dict[float, str]]:
    """{title: {budget: key in `robust_accuracy`}}: FGSM alone, as published; else each sample's worst case."""
    found: dict[str, dict[float, str]] = {}
    for attack in attacks:
        title, key = f"worst case of {attack.threat} attacks", f"worst {attack.threat}"
        if attack.name.startswith("fgsm"):
            title = key = attack.name
        found.setdefault(title, {})[attack.epsilon] = f"{key} {attack.epsilon:g}"
    return found


def groups(rows: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of equal label: the seeds of a line, or the rates of its sweep."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["label"], []).append(row)
    return list(found.values())


def largest(condition_numbers: dict[str, float | None]) -> float:
    """The largest one of all layers; inf where one is not finite."""
    return max(math.inf if value is None else value for value in condition_numbers.values())


def summary_table(rows: Iterable[dict[str, Any]]) -> str:
    """What was trained: the largest κ is that of all layers and seeds."""
    lines = []
    for group in groups(rows):
        kappa = max(largest(row["condition_numbers"]) for row in group)
        clean = mean_and_spread([row["clean_accuracy"] for row in group]) if "clean_accuracy" in group[0] else ""
        size, rate = f"{group[0]['parameters']:,}", f"{group[0]['learning_rate']:g}"
        lines.append([group[0]["label"], rate, size, clean, f"{kappa:.4g}", len(group)])
    header = ["method", "learning rate", "parameters", "clean %", "largest κ", "seeds"]
    return markdown_table(header, lines, align="lr")


def _robustness(rows: Iterable[dict[str, Any]], keys: dict[float, str]) -> str:
    """A line for each method, a column for each budget; over the seeds that met the attack."""
    lines = []
    for group in groups(rows):
        values = [
            [row["robust_accuracy"][key] for row in group if key in row["robust_accuracy"]] for key in keys.values()
        ]
        lines.append([group[0]["label"], *(mean_and_spread(value) if value else "" for value in values)])
    return markdown_table(["method", *(f"ε = {budget:g}" for budget in keys)], lines, align="lr")


def sweep_table(rows: Sequence[dict[str, Any]]) -> str:
    """Validation accuracy of each method at each learning rate."""
    rates = sorted({row["learning_rate"] for row in rows})
    lines = []
    for group in groups(rows):
        found = {
            row["learning_rate"]: "diverged" if row["diverged"] else f"{100 * row['validation_accuracy']:.2f}"
            for row in group
        }
        lines.append([group[0]["label"], *(found.get(rate, "") for rate in rates)])
    table = markdown_table(["method", *(f"{rate:g}" for rate in rates)], lines, align="lr")
    return f"Sweep: validation accuracy in %, first seed\n\n{table}"


def _doubts(results: dict[str, Any], rates: Sequence[float]) -> list[str]:
    """Choices at the edge of the sweep, methods that diverged, and checks of the attacks that failed."""
    lines = []
    for choice in results["chosen"]:
        label, rate = choice["label"], choice["learning_rate"]
        if rate is None:
            lines.append(f"- {label}: diverged at every learning rate")
        elif len(rates) > 1 and rate in (min(rates), max(rates)):
            lines.append(f"- {label}: {rate:g} lies at the edge of the sweep, which should be extended")
    for row in results["rows"]:
        failures = ["diverged"] if row["diverged"] else row.get("failed_checks", [])
        lines += [f"- {row['label']}, seed {row['seed']}: {failure}" for failure in failures]
    return ["Reasons for doubt", "\n".join(lines)] if lines else []
