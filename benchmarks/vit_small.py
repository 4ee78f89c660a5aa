"""A small ViT on MNIST or CIFAR-10, from scratch: dense, low rank without constraint, and low rank with κ ≤ 1 + τ.

4 layers of 4 heads. MNIST: grey 28x28 images, patches of 7, width 96, 450,000 parameters. CIFAR-10: 32x32, patches of
8, width 128, 820,000 parameters; training images are mirrored and shifted. The factored methods keep a rank ratio of
0.25 in every linear layer but the classifier, or remove a share of those layers' weights (`compression_ratios`), from
the truncated SVD of the same fresh weights as the dense model. AdamW without weight decay (it would act on W in one
model and on S in another), linear warm-up, cosine schedule.

Every method trains at every learning rate with one seed; accuracy on held out training images, without attack,
chooses; the other seeds train at the choice only. The models saved here are attacked on the test split, which nothing
else looks at: by `robustness_study.py`, or here with `--epsilons`. What is finished is kept, and a second call goes on
from there.

    python benchmarks/vit_small.py --learning_rates 3e-4 1e-3 3e-3 1e-2
    python benchmarks/vit_small.py --dataset cifar10 --compression_ratios 0.6 0.8 --train_images 30000 --epochs 2 \
        --batch_size 128 --learning_rates 2e-4 8e-4 3.2e-3 1.28e-2 5.12e-2 --epsilons 1/255 2/255 4/255
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from record import digest, markdown, mean_and_spread, method_label, sweep_table, write_record
from rows import Rows
from torch.utils.data import TensorDataset
from transformers import AutoModelForImageClassification, HfArgumentParser
from vit_parts import DATA_SETS, TrainingOptions, load_splits, logger, pixel_model, train

from hf_condlr.robustness.attacks import make_attacks
from hf_condlr.robustness.evaluation import RobustnessReport, evaluate_robustness


@dataclass
class Options:
    """What the experiment varies, and where it writes."""

    dataset: str = field(default="mnist", metadata={"help": "Which images.", "choices": list(DATA_SETS)})
    output_dir: str = field(
        default="outputs", metadata={"help": "Rows, models and results go to vit_DATASET in this folder."}
    )
    methods: list[str] = field(
        default_factory=lambda: ["dense", "unconstrained", "tau=0.1"],
        metadata={"help": "dense, unconstrained, or tau=NUMBER (tau=inf: orthonormal bases only)."},
    )
    compression_ratios: list[float] = field(
        default_factory=list,
        metadata={"help": "Shares of the converted weights that each factored method removes; else rank_ratio counts."},
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 3e-3, 1e-2], metadata={"help": "The sweep, the same for every method."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds at the chosen learning rate; the first one sweeps."}
    )
    epsilons: list[str] = field(
        default_factory=list, metadata={"help": "ℓ∞ radii, in pixels of [0, 1], of FGSM and of PGD with two losses."}
    )
    pgd_steps: int = field(default=10, metadata={"help": "Of PGD, with one random start."})
    test_images: int = field(default=1000, metadata={"help": "The first so many test images are attacked."})
    check_samples: int = field(default=64, metadata={"help": "Images of the checks, for the first seed."})
    threads: int = field(default=1, metadata={"help": "Of torch."})


class Experiment:
    """Runs what is missing, and remembers it in the output folder."""

    def __init__(self, options: Options, training: TrainingOptions) -> None:
        self.options, self.training = options, training
        self.folder = Path(options.output_dir) / f"vit_{options.dataset}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trained = Rows(self.folder / "train.jsonl")
        self.data = load_splits(options.dataset, training)

    def variants(self) -> Iterator[tuple[str, TrainingOptions]]:
        """The methods, each factored one with each budget."""
        for method in self.options.methods:
            ratios = self.options.compression_ratios if method != "dense" else []
            if not ratios:
                yield method, self.training
            for ratio in ratios:
                yield method, replace(self.training, rank_ratio=None, compression_ratio=ratio)

    def train(self, method: str, options: TrainingOptions, learning_rate: float, seed: int) -> dict[str, Any]:
        """The row of one training; its model lies in the folder that `model` names."""
        settings = {name: value for name, value in asdict(options).items() if value is not None}
        if method == "dense":  # does not depend on how factored ones are made
            del settings["rank_ratio"], settings["conditioning_warmup"]
        key = {"method": method, "learning_rate": learning_rate, "seed": seed, **settings}
        row = self.trained.find(key)
        if row is None:
            result, model = train(method, learning_rate, seed, self.data, options, self.options.dataset)
            name = f"{method}-lr{learning_rate:g}-seed{seed}-{digest(key)}"
            model.save_pretrained(self.folder / "models" / name)
            row = self.trained.add(key, result | {"model": f"models/{name}"})
            logger.info("%s lr=%g seed=%d: validation %.4f", method, learning_rate, seed, row["validation_accuracy"])
        return row

    def run(self) -> dict[str, Any]:
        """Sweep, choose, train the other seeds."""
        o, best, sweep = self.options, [], []
        for method, options in self.variants():
            sweep.append([self.train(method, options, rate, o.seeds[0]) for rate in sorted(o.learning_rates)])
        for (method, options), rows in zip(self.variants(), sweep, strict=True):
            chosen = max(rows, key=lambda row: row["validation_accuracy"])["key"]["learning_rate"]
            best += [self.train(method, options, chosen, seed) for seed in o.seeds]
        return {"best": best, "sweep": [row for rows in sweep for row in rows]}

    def attack(self, row: dict[str, Any]) -> RobustnessReport:
        """The report of one model on the test split, made once."""
        o, path = self.options, self.folder / row["model"]
        attacks = make_attacks(["fgsm", "pgd-linf", "pgd-linf-margin"], o.epsilons, steps=o.pgd_steps)
        images = TensorDataset(*self.data["test"].batch(torch.arange(o.test_images)))
        folder = self.folder / "reports" / f"{path.name}-{digest({'attacks': [str(a.settings()) for a in attacks]})}"
        if (folder / "report.json").exists() and RobustnessReport.load(folder / "report.json").samples == len(images):
            return RobustnessReport.load(folder / "report.json")
        report = evaluate_robustness(
            pixel_model(AutoModelForImageClassification.from_pretrained(path).eval(), o.dataset),
            images,
            attacks,
            name=label(row),
            batch_size=100,
            checks=row["key"]["seed"] == o.seeds[0],
            check_samples=o.check_samples,
            output_dir=folder,
            progress=False,
        )
        logger.info("seed %d\n%s", row["key"]["seed"], report)
        return report


def label(row: dict[str, Any]) -> str:
    """Method and budget, for tables."""
    removed = row["key"].get("compression_ratio")
    return method_label(row["key"]["method"]) + (f", {100 * removed:g} % removed" if removed else "")


def largest_kappa(row: dict[str, Any]) -> float:
    """Of the encoder's linear layers, which the methods differ in."""
    return max(value or math.inf for name, value in row["condition_numbers"].items() if ".layers." in name)


def attack_table(rows: list[dict[str, Any]], reports: list[RobustnessReport]) -> str:
    """Accuracy in %, mean ± standard deviation over the seeds; κ over the r singular values of factored layers."""
    attacks = [(attack.name, attack.epsilon) for attack in reports[0].attacks]
    attacks += [("worst case", case.epsilon) for case in reports[0].worst_cases]
    lines = []
    for name in dict.fromkeys(map(label, rows)):
        runs = [(row, report) for row, report in zip(rows, reports, strict=True) if label(row) == name]
        kappa = statistics.mean(largest_kappa(row) for row, _ in runs)
        values = [
            [report.clean_accuracy, *(a.robust_accuracy for a in (*report.attacks, *report.worst_cases))]
            for _, report in runs
        ]
        facts = [f"{runs[0][0]['key']['learning_rate']:g}", f"{runs[0][0]['parameters']:,}", f"{kappa:,.4g}"]
        lines.append([name, *facts, *(mean_and_spread(column, 1) for column in zip(*values, strict=True))])
    header = [f"{name} {255 * epsilon:g}/255" for name, epsilon in attacks]
    return markdown(["method", "learning rate", "parameters", "largest κ", "clean", *header], lines)


def main() -> None:
    """Run what is missing, print the tables, write the record."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    options, training = HfArgumentParser((Options, TrainingOptions)).parse_args_into_dataclasses()
    torch.set_num_threads(options.threads)
    experiment = Experiment(options, training)
    results = experiment.run()
    rates = sorted(options.learning_rates)
    for name in dict.fromkeys(map(label, results["sweep"])):
        print(f"{name}\n\n{sweep_table([row for row in results['sweep'] if label(row) == name], rates)}\n")
    if options.epsilons:
        reports = [experiment.attack(row) for row in results["best"]]
        print(attack_table(results["best"], reports))
        for row, report in zip(results["best"], reports, strict=True):
            for check in report.failed_checks:
                print(f"{label(row)}, seed {row['key']['seed']}: {check}")
        results["reports"] = [report.to_dict() for report in reports]
    print("wrote", write_record(experiment.folder / "results.json", results, options, training))


if __name__ == "__main__":
    main()
