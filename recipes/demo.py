"""Dense, low-rank and robust low-rank training side by side, on real digits, in a few minutes on a laptop.

    python recipes/demo.py                    # one seed
    python recipes/demo.py --seeds 0 1 2      # mean ± standard deviation

Trains a dense ViT a little, then continues from it by `image_classification.py` once per method, everything else
alike: epochs, sweep of learning rates, attacks. Prints one table, and draws `demo.png`.
"""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from transformers import HfArgumentParser

RECIPE = Path(__file__).with_name("image_classification.py")
# One thread: matrices this small gain little from more, and lose much where cores are shared.
LAUNCH = ["--num_processes=1", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
LAUNCH += ["--num_cpu_threads_per_process=1"]
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
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many, for a try."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Test on the first so many, for a try."})
    output_dir: str = field(default="outputs/demo", metadata={"help": "Folder of all results and of demo.png."})


def run(args: Arguments, folder: Path, **options: object) -> dict:
    """Launch the recipe; returns the result that it wrote."""
    options |= {"max_train_samples": args.max_train_samples, "max_eval_samples": args.max_eval_samples}
    command = [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH, str(RECIPE), "--output_dir", str(folder)]
    for name, value in options.items():
        if value is not None:
            command += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"demo: the recipe failed, see above. It was started by\n{' '.join(command)}")
    return json.loads((folder / "result.json").read_text())


def compare(args: Arguments, seed: int) -> dict[str, dict]:
    """All methods from one pretrained dense ViT; {method: result}."""
    folder = Path(args.output_dir) / f"seed{seed}"
    print(f"Seed {seed}: training the dense ViT that all methods start from", flush=True)
    start = {"method": "dense", "seed": seed, "epochs": args.pretraining_epochs, "learning_rates": 1e-3}
    run(args, folder / "pretrained", **start, epsilons=TABLE_EPSILONS)
    settings = {"pretrained": folder / "pretrained", "seed": seed, "epochs": args.epochs, "tau": TAU}
    settings |= {"learning_rates": args.learning_rates, "epsilons": EPSILONS}
    return {method: run(args, folder / method, method=method, **settings) for method in METHODS}


def robust_accuracy(result: dict, epsilon: float) -> float:
    """Share of the test images that are still classified correctly."""
    return next(attack["accuracy"] for attack in result["robust"] if math.isclose(attack["epsilon"], epsilon))


def condition_numbers(result: dict) -> list[float]:
    """κ of each layer; inf where a weight lost rank."""
    return [math.inf if value is None else value for value in result["condition_numbers"].values()]


# Heading: what is measured in a result, and how it is written.
COLUMNS: dict[str, tuple[Callable[[dict], float], str]] = {
    "parameters": (lambda result: result["parameters"], ",.0f"),
    "of dense": (lambda result: result["parameters"] / result["dense_parameters"], ".0%"),
    "clean": (lambda result: result["clean"]["accuracy"], ".1%"),
    **{f"ε = {e:g}": (lambda result, e=e: robust_accuracy(result, e), ".1%") for e in TABLE_EPSILONS},
    "largest κ": (lambda result: max(condition_numbers(result)), ",.2f"),
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
        layers = list(zip(*map(condition_numbers, runs), strict=True))
        curves = zip(
            *([run["clean"]["accuracy"], *(robust_accuracy(run, e) for e in EPSILONS)] for run in runs),
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
    samples, epsilon = results[0]["dense"]["clean"]["samples"], TABLE_EPSILONS[-1]
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
    results = [compare(args, seed) for seed in args.seeds]
    folder = Path(args.output_dir)
    draw(results, folder / "demo.png")
    (folder / "table.md").write_text(table(results) + "\n")
    print(f"\n{table(results)}\n{explain(results)}")
    print(f"Picture: {folder}/demo.png. Table: {folder}/table.md. Every sweep: {folder}/seed*/*/result.json")


if __name__ == "__main__":
    main(HfArgumentParser(Arguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses()[0])
