"""Dense, low-rank and robust low-rank training side by side, on real digits, in a few minutes on a laptop.

    python recipes/demo.py --seeds 0 1 2      # mean ± standard deviation; one seed by default

Trains a small dense ViT, then continues from it with each method, everything else equal: epochs, sweep of learning
rates, attacks. Prints a table, and draws `demo.png`. Copy this file and change it: it needs no other.
"""

import copy
import json
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, disable_progress_bars
from matplotlib.figure import Figure
from PIL.Image import fromarray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm.auto import tqdm
from transformers import (
    EvalPrediction,
    PrinterCallback,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging

from hf_condlr import (
    CondLRConfig,
    CondLRTrainingArguments,
    ScriptParser,
    condition_report,
    evaluate_robustness,
    get_robust_lowrank_model,
    trainer_class,
)
from hf_condlr.robustness.attacks import PGD
from hf_condlr.tables import markdown_table

METHODS = {"dense": "#666666", "lowrank": "#d1802f", "condlr": "#2b6cb0"}
TABLE_EPSILONS = (0.05, 0.1)
EPSILONS = (0.025, 0.05, 0.075, 0.1, 0.15)
TAU, RANK_RATIO = 0.1, 0.2
PRETRAINING_EPOCHS = 6


@dataclass
class Arguments:
    """Comparison."""

    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "One comparison for each; several give mean ± spread."}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2, 3e-2], metadata={"help": "Tried by every method."}
    )
    epochs: int = field(default=15, metadata={"help": "Of each method, for each learning rate."})
    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder of the images, all results, demo.png."})


def write_digits(folder: str | Path) -> DatasetDict:
    """scikit-learn's 1,797 grey 8×8 images as parquet: 45 % train, 15 % validation, 40 % test, always the same."""
    pixels, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(range(len(labels)), test_size=0.4, stratify=labels, random_state=0)
    train, validation = train_test_split(rest, test_size=0.25, stratify=labels[rest], random_state=0)
    features = Features({"image": Image(), "label": ClassLabel(num_classes=10)})
    Path(folder).mkdir(parents=True, exist_ok=True)
    data = DatasetDict()
    for name, indices in {"train": train, "validation": validation, "test": test}.items():
        images = [fromarray((pixels[i].reshape(8, 8) * 255 / 16).round().astype("uint8")) for i in indices]
        data[name] = Dataset.from_dict({"image": images, "label": labels[indices]}, features=features)
        data[name].to_parquet(Path(folder, f"{name}.parquet"))
    return data


def normalized(images: Dataset, processor: Any) -> list[dict[str, Any]]:
    """Rows as inputs of the model, read once: there are few, and every method passes over them many times."""
    rows = images[:]
    pixels = processor(rows["image"], return_tensors="pt")["pixel_values"]
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, rows["label"], strict=True)]


def train(
    args: Arguments, model: Any, data: DatasetDict, processor: Any, method: str, rate: float, epochs: int, seed: int
) -> Trainer:
    """Train one model; the Trainer holds it afterwards."""
    training_args = CondLRTrainingArguments(
        output_dir=args.output_dir,
        num_train_epochs=epochs,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.0,  # it would act on W in the dense model and on S in a factored one: a second difference
        per_device_train_batch_size=32,
        per_device_eval_batch_size=256,
        seed=seed,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.accelerator.is_available(),
        **{"save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True},
    )
    trainer = trainer_class(method)(
        model=model,
        args=training_args,
        train_dataset=normalized(data["train"], processor),
        eval_dataset=normalized(data["validation"], processor),
        data_collator=default_data_collator,
        compute_metrics=accuracy,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of correct classes, without an attack."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def compare(args: Arguments, data: DatasetDict, seed: int) -> dict[str, dict[str, Any]]:
    """Train all methods from one pretrained dense ViT; {method: result}."""
    folder = Path(args.output_dir) / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.stack([np.asarray(image) / 255 for image in data["train"]["image"]])
    processor = ViTImageProcessorPil(do_resize=False, image_mean=[pixels.mean()], image_std=[pixels.std()])
    sizes = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 384}
    names = {i: str(i) for i in range(10)}
    set_seed(seed)
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, id2label=names, **sizes))
    results = {}
    with tqdm(total=1 + len(METHODS) * len(args.learning_rates), desc=f"seed {seed}", unit="training") as bar:
        train(args, model, data, processor, "dense", 1e-3, PRETRAINING_EPOCHS, seed)
        bar.update()
        for method in METHODS:
            results[method], trained = sweep(args, model, data, processor, seed, method, bar)
            for part in (trained, processor):  # for `from_pretrained`, and for recipes/space
                part.save_pretrained(folder / method)
            (folder / f"{method}.json").write_text(json.dumps(results[method], indent=2) + "\n")
    return results


def sweep(
    args: Arguments, start: Any, data: DatasetDict, processor: Any, seed: int, method: str, bar: tqdm
) -> tuple[dict[str, Any], Any]:
    """Train at each learning rate; the model that validates best is tested, attacked and returned."""
    begin, runs = time.perf_counter(), []
    for rate in args.learning_rates:
        model = copy.deepcopy(start)
        if method != "dense":
            get_robust_lowrank_model(model, CondLRConfig(rank_ratio=RANK_RATIO, tau=TAU))
        trainer = train(args, model, data, processor, method, rate, args.epochs, seed)
        found = trainer.evaluate()
        loss = found["eval_loss"] if math.isfinite(found["eval_loss"]) else None  # JSON has no NaN
        runs.append(({"learning_rate": rate, "accuracy": found["eval_accuracy"], "loss": loss}, trainer))
        bar.update()
    chosen, trainer = min(runs, key=lambda run: worse(run[0]))
    options = {"processor": processor, "batch_size": 256, "checks": False, "progress": False}
    report = evaluate_robustness(trainer.model, data["test"], [PGD(epsilon) for epsilon in EPSILONS], **options)
    return {
        "learning_rate": chosen["learning_rate"],
        "sweep": [record for record, _ in runs],
        "samples": report.samples,
        "clean": report.clean_accuracy,
        "robust": {str(attack.epsilon): attack.robust_accuracy for attack in report.attacks},
        **describe(trainer.model, method),
        "seconds": time.perf_counter() - begin,
    }, trainer.model


def worse(record: dict[str, Any]) -> tuple[float, float]:
    """Least for the best: clean accuracy decides, among equals the loss."""
    return -record["accuracy"], math.inf if record["loss"] is None else record["loss"]


def describe(model: Any, method: str) -> dict[str, Any]:
    """Size, and κ of every linear weight but the classifier's, as trained; None where a weight lost rank."""
    dense_parameters = parameters = model.num_parameters()
    if method == "dense":  # σ_max/σ_min over all singular values; over the r of its rank in a factored layer
        linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "classifier"}
        kappa = {name: torch.linalg.cond(layer.weight.detach().double()).item() for name, layer in linear.items()}
    else:
        report = condition_report(model)
        kappa = {layer.name: layer.condition_number for layer in report.layers}
        dense_parameters = report.dense_parameters
    kappa = {name: value if math.isfinite(value) else None for name, value in kappa.items()}
    return {"parameters": parameters, "dense_parameters": dense_parameters, "condition_numbers": kappa}


def spectrum(result: dict[str, Any]) -> list[float]:
    """κ of each layer; inf where a weight lost rank."""
    return [math.inf if value is None else value for value in result["condition_numbers"].values()]


# Heading: what is measured in a result, and how it is written.
COLUMNS: dict[str, tuple[Any, str]] = {
    "parameters": (lambda result: result["parameters"], ",.0f"),
    "of dense": (lambda result: result["parameters"] / result["dense_parameters"], ".0%"),
    "clean": (lambda result: result["clean"], ".1%"),
    **{f"ε = {e:g}": (lambda result, e=e: result["robust"][str(e)], ".1%") for e in TABLE_EPSILONS},
    "largest κ": (lambda result: max(spectrum(result)), ",.2f"),
    "seconds": (lambda result: result["seconds"], ".0f"),
}


def table(results: list[dict[str, dict]]) -> str:
    """A Markdown table whose columns line up as text too."""
    rows = [["method", *COLUMNS, "learning rate"]]
    for method in METHODS:
        runs = [by_method[method] for by_method in results]
        cells = [spread([measure(result) for result in runs], form) for measure, form in COLUMNS.values()]
        rows.append([method, *cells, ", ".join(f"{r:g}" for r in sorted({run["learning_rate"] for run in runs}))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *rows = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return markdown_table(head, rows, align="lr")


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
        curves = list(zip(*([run["clean"], *run["robust"].values()] for run in runs), strict=True))
        lines = [(left, range(1, len(layers) + 1), layers, statistics.geometric_mean)]
        lines += [(right, (0, *EPSILONS), curves, statistics.mean)]
        for axes, x, points, mean in lines:
            axes.plot(x, [mean(p) for p in points], "o-", markersize=4, linewidth=1.5, color=color, label=method)
            axes.fill_between(x, [min(p) for p in points], [max(p) for p in points], color=color, alpha=0.15, lw=0)
            axes.grid(alpha=0.25)
    left.axhline(1 + TAU, color=METHODS["condlr"], linewidth=1, linestyle=":", label=f"bound 1 + τ = {1 + TAU:g}")
    left.set(yscale="log", xlabel="linear layer, from input to output", ylabel="κ(W) = σ_max/σ_min")
    left.set_title("Condition number of each layer")
    right.set(ylim=(0, 1.02), xlabel="attack radius ε (pixels in [0, 1])", ylabel="test accuracy")
    right.set_title("Accuracy under attack (PGD, ℓ∞)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


EXPLANATION = f"""
Each method chose its learning rate on validation images, by clean accuracy; all columns come from the test images.

- largest κ: after its warm-up condlr keeps every converted layer at 1 + τ = {1 + TAU:g} or below, at every step.
  Nothing bounds it in the others. (κ of dense counts all singular values, κ of the others those of their rank.)
- of dense: the share of the model's parameters that both low-rank methods keep while they train.
- ε: accuracy if an attack (PGD) may change each pixel by ε of its range. With so few images, differences of a few
  points mean nothing: --seeds 0 1 2 shows mean ± standard deviation.
- A small κ is a reason to expect robustness, no certificate: attention, residuals and normalisation escape it.
"""


def main(args: Arguments) -> None:
    """Run, print, draw."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of transformers
    disable_progress_bars()  # of datasets
    torch.set_num_threads(1)  # matrices this small gain little from more, and lose much where cores are shared
    folder = Path(args.output_dir)
    data = write_digits(folder / "digits")
    results = [compare(args, data, seed) for seed in args.seeds]
    draw(results, folder / "demo.png")
    (folder / "table.md").write_text(table(results) + "\n", encoding="utf-8")
    print(f"\n{table(results)}\n{EXPLANATION}")
    print(f"Picture: {folder}/demo.png. Table: {folder}/table.md. Every sweep: {folder}/seed*/*.json")
    print(f"Models: {folder}/seed*/*/. To try them in a browser: recipes/space")


if __name__ == "__main__":
    main(*ScriptParser(Arguments, description=__doc__.splitlines()[0]).parse())
