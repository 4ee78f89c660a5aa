"""Dense, low-rank and robust low-rank training side by side, on real digits, in a few minutes on a laptop.

    python recipes/demo.py                    # one seed
    python recipes/demo.py --seeds 0 1 2      # mean ± standard deviation

Trains a dense ViT a little, then continues from it by `image_classification.py` once per method, everything else
alike: epochs, sweep of learning rates, attacks. Prints one table, and draws `demo.png`.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import image_classification as recipe
import numpy as np
import torch
from datasets import DatasetDict, disable_progress_bars
from digits import write_digits
from image_data import DataArguments, decoded, load_data
from matplotlib.figure import Figure
from method import MethodArguments
from running import save
from tqdm.auto import tqdm
from transformers import (
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)
from transformers.utils import logging

from hf_condlr import CondLRTrainingArguments, condition_report

METHODS = {"dense": "#666666", "lowrank": "#d1802f", "condlr": "#2b6cb0"}
TABLE_EPSILONS = (0.05, 0.1)
EPSILONS = (0.025, 0.05, 0.075, 0.1, 0.15)
TAU = 0.1


@dataclass
class Arguments:
    """What the command line may set."""

    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "One comparison for each; several give mean ± spread."}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1], metadata={"help": "Tried by every method."}
    )
    pretraining_epochs: int = field(default=6, metadata={"help": "Of the dense ViT that all methods start from."})
    epochs: int = field(default=15, metadata={"help": "Of each method, for each learning rate."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many, for a try."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Validate and test on so many, for a try."})
    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder of all results and of demo.png."})


def compare(args: Arguments, data_args: DataArguments, seed: int) -> dict[str, dict[str, Any]]:
    """All methods from one pretrained dense ViT; {method: result}."""
    data = load_data(data_args)
    folder = Path(args.output_dir) / f"seed{seed}"
    random, pretrained = folder / "random", folder / "pretrained"
    write_model(random, data, seed)
    total = 1 + len(METHODS) * len(args.learning_rates)
    with tqdm(total=total, desc=f"seed {seed}", unit="training") as bar:
        save(train(random, data, data_args, "dense", 1e-3, args.pretraining_epochs, seed), pretrained)
        bar.update()
        results = {}
        for method in METHODS:
            results[method] = sweep(args, pretrained, data, data_args, seed, method, bar)
            (folder / f"{method}.json").write_text(json.dumps(results[method], indent=2) + "\n")
    return results


def write_model(folder: Path, data: DatasetDict, seed: int) -> None:
    """A small ViT with random weights and its image processor, as a checkpoint."""
    set_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=10,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    pixels = np.stack([np.asarray(image) / 255 for image in decoded(data["train"])["image"]])
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[pixels.mean()], image_std=[pixels.std()])
    processor.save_pretrained(folder)


def train(
    start: Path, data: DatasetDict, data_args: DataArguments, method: str, learning_rate: float, epochs: int, seed: int
) -> Trainer:
    """One training by the recipe, from the checkpoint `start`."""
    training_args = CondLRTrainingArguments(
        output_dir=str(start.parent / method),
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        # None: it would act on W in the dense model and on S in a factored one, a second difference.
        weight_decay=0.0,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=256,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.accelerator.is_available(),
        disable_tqdm=True,
    )
    factored = {} if method == "dense" else {"rank_ratio": 0.2, "tau": TAU}
    model_args = MethodArguments(str(start), method=method, **factored)
    trainer = recipe.make_trainer(model_args, data_args, training_args, data)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def sweep(
    args: Arguments, start: Path, data: DatasetDict, data_args: DataArguments, seed: int, method: str, bar: tqdm
) -> dict[str, Any]:
    """Train at each learning rate; the model that validates best meets the test split and the attacks."""
    begin, runs = time.perf_counter(), []
    for learning_rate in args.learning_rates:
        trainer = train(start, data, data_args, method, learning_rate, args.epochs, seed)
        validation = trainer.evaluate()
        loss = validation["eval_loss"]
        record = {
            "learning_rate": learning_rate,
            "accuracy": validation["eval_accuracy"],
            "loss": loss if math.isfinite(loss) else None,  # JSON has no NaN
        }
        runs.append((record, trainer))
        bar.update()
    chosen, trainer = min(runs, key=lambda run: worse(run[0]))
    metrics, _ = recipe.test(trainer, data_args, data["test"])
    return {
        "learning_rate": chosen["learning_rate"],
        "sweep": [record for record, _ in runs],
        "samples": len(data["test"]),
        "clean": metrics["test_accuracy"],
        "robust": {str(epsilon): metrics[f"test_accuracy_pgd_linf_{epsilon:g}"] for epsilon in EPSILONS},
        **describe(trainer.model, method),
        "seconds": time.perf_counter() - begin,
    }


def worse(record: dict[str, Any]) -> tuple[float, float]:
    """Least for the best: clean accuracy decides, among equals the loss."""
    return -record["accuracy"], math.inf if record["loss"] is None else record["loss"]


def describe(model: ViTForImageClassification, method: str) -> dict[str, Any]:
    """Size, and κ of every linear weight but the classifier's, as trained; None where a weight lost rank."""
    parameters = model.num_parameters()
    if method == "dense":  # σ_max/σ_min over all singular values; over the r of its rank in a factored layer
        linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "classifier"}
        kappa = {name: torch.linalg.cond(layer.weight.detach().double()).item() for name, layer in linear.items()}
        dense_parameters = parameters
    else:
        report = condition_report(model)
        kappa = {layer.name: layer.condition_number for layer in report.layers}
        dense_parameters = report.dense_parameters
    return {
        "parameters": parameters,
        "dense_parameters": dense_parameters,
        "condition_numbers": {name: value if math.isfinite(value) else None for name, value in kappa.items()},
    }


def robust_accuracy(result: dict[str, Any], epsilon: float) -> float:
    """Share of the test images that are still classified correctly."""
    return result["robust"][str(epsilon)]


def spectrum(result: dict[str, Any]) -> list[float]:
    """κ of each layer; inf where a weight lost rank."""
    return [math.inf if value is None else value for value in result["condition_numbers"].values()]


# Heading: what is measured in a result, and how it is written.
COLUMNS: dict[str, tuple[Callable[[dict], float], str]] = {
    "parameters": (lambda result: result["parameters"], ",.0f"),
    "of dense": (lambda result: result["parameters"] / result["dense_parameters"], ".0%"),
    "clean": (lambda result: result["clean"], ".1%"),
    **{f"ε = {e:g}": (lambda result, e=e: robust_accuracy(result, e), ".1%") for e in TABLE_EPSILONS},
    "largest κ": (lambda result: max(spectrum(result)), ",.2f"),
    "seconds": (lambda result: result["seconds"], ".0f"),
}


def table(results: list[dict[str, dict]]) -> str:
    """A Markdown table, in columns that line up as text too."""
    rows = [["method", *COLUMNS, "learning rate"], ["---"] + ["---:"] * (len(COLUMNS) + 1)]
    for method in METHODS:
        runs = [by_method[method] for by_method in results]
        cells = [spread([measure(result) for result in runs], form) for measure, form in COLUMNS.values()]
        rates = sorted({result["learning_rate"] for result in runs})
        rows.append([method, *cells, ", ".join(f"{rate:g}" for rate in rates)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join([row[0].strip().ljust(widths[0]), *row[1:]])} |" for row in padded)


def spread(values: list[float], form: str) -> str:
    """The mean, and the standard deviation where there are several different values; large numbers as integers."""
    mean = statistics.mean(values)
    form = ",.0f" if mean >= 100 else form
    deviation = f" ± {statistics.stdev(values):{form}}" if len(set(values)) > 1 else ""
    return f"{mean:{form}}{deviation}"


def draw(results: list[dict[str, dict]], path: Path) -> None:
    """κ of every layer, and accuracy over ε; a line per method, a band from the least to the largest of the seeds."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for method, color in METHODS.items():
        runs = [by_method[method] for by_method in results]
        layers = list(zip(*map(spectrum, runs), strict=True))
        curves = zip(
            *([run["clean"], *(robust_accuracy(run, e) for e in EPSILONS)] for run in runs),
            strict=True,
        )
        for axes, x, points, mean in (
            (left, range(1, len(layers) + 1), layers, statistics.geometric_mean),
            (right, (0, *EPSILONS), list(curves), statistics.mean),
        ):
            axes.plot(x, [mean(p) for p in points], "o-", markersize=4, linewidth=1.5, color=color, label=method)
            axes.fill_between(x, [min(p) for p in points], [max(p) for p in points], color=color, alpha=0.15, lw=0)
    left.axhline(1 + TAU, color=METHODS["condlr"], linewidth=1, linestyle=":", label=f"bound 1 + τ = {1 + TAU:g}")
    left.set(yscale="log", xlabel="linear layer, from input to output", ylabel="κ(W) = σ_max/σ_min")
    left.set_title("Condition number of each layer")
    right.set(ylim=(0, 1.02), xlabel="attack radius ε (pixels in [0, 1])", ylabel="test accuracy")
    right.set_title("Accuracy under attack (PGD, ℓ∞)")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def explain(results: list[dict[str, dict]]) -> str:
    """What the table says and what it does not."""
    samples, epsilon = results[0]["dense"]["samples"], TABLE_EPSILONS[-1]
    p = robust_accuracy(results[0]["dense"], epsilon)
    noise = 200 * math.sqrt(2 * p * (1 - p) / samples)  # two standard errors of a difference
    seeds = f"Mean ± standard deviation over {len(results)} seeds.\n" if len(results) > 1 else ""
    bound = f"1 + τ = {1 + TAU:g}"
    return f"""
Each method chose its learning rate on validation images, by clean accuracy; all columns come from {samples}
other images, used once. ε = {epsilon:g}: accuracy if an attack (PGD) may change pixels by {epsilon:.0%} of their range.
{seeds}
What to read off
- largest κ: once its warm-up is over, condlr keeps every converted layer at {bound} or below, at every step.
  Nothing bounds it in the others. (κ of dense counts all singular values, κ of the others those of their rank.)
- of dense: the share of the model's parameters that both low-rank methods keep while they train.
- clean, ε: what that costs or gains here. From one seed and so few images, methods less than about {noise:.0f} points
  apart at ε = {epsilon:g} are not told apart. --seeds 0 1 2 shows the spread.
- A small κ is a reason to expect robustness, no certificate: attention, residuals and normalisation escape it.
"""


def main(args: Arguments) -> None:
    """Run, print, draw."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    # One thread: matrices this small gain little from more, and lose much where cores are shared.
    torch.set_num_threads(1)
    folder = Path(args.output_dir)
    write_digits(folder / "digits")
    data_args = DataArguments(
        str(folder / "digits"),
        max_train_samples=args.max_train_samples,
        max_eval_samples=args.max_eval_samples,
        epsilons=[str(epsilon) for epsilon in EPSILONS],
        attack_checks=False,
    )
    results = [compare(args, data_args, seed) for seed in args.seeds]
    draw(results, folder / "demo.png")
    (folder / "table.md").write_text(table(results) + "\n")
    print(f"\n{table(results)}\n{explain(results)}")
    print(f"Picture: {folder}/demo.png. Table: {folder}/table.md. Every sweep: {folder}/seed*/*.json")


if __name__ == "__main__":
    main(HfArgumentParser(Arguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
