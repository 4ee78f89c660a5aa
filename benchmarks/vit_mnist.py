"""A small ViT on MNIST, from scratch: dense, low rank without constraint, and low rank with κ ≤ 1 + τ.

Grey 28x28 images, patches of 7, width 96, 4 layers of 4 heads, MLPs of 384: 450,000 parameters, of which the factored
methods keep a rank ratio of 0.25 in every linear layer but the classifier, from the truncated SVD of the same fresh
weights as the dense model. AdamW without weight decay (it would act on W in one model and on S in another), linear
warm-up, cosine schedule.

Every method trains at every learning rate with one seed; accuracy on held out training images, without attack,
chooses; the other seeds train at the choice only. The test split is left to `robustness_study.py`, which attacks the
models saved here. Finished trainings are kept, and a second call goes on from there.
"""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lenet5_parts import MEAN, STD, Split, accuracy, condition_numbers, load_mnist, one_epoch, tolerance
from record import digest, sweep_table, write_record
from rows import Rows
from transformers import HfArgumentParser, ViTConfig, ViTForImageClassification, get_cosine_schedule_with_warmup

from hf_condlr import CondLRConfig, attach_manifold_step, condition_report, get_robust_lowrank_model
from hf_condlr.attacks import PixelModel

logger = logging.getLogger("vit_mnist")


@dataclass
class Options:
    """What the experiment varies, and where it writes."""

    output_dir: str = field(default="outputs/vit_mnist", metadata={"help": "Rows, models and results go here."})
    methods: list[str] = field(
        default_factory=lambda: ["dense", "unconstrained", "tau=0.1"],
        metadata={"help": "dense, unconstrained, or tau=NUMBER (tau=inf: orthonormal bases only)."},
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 3e-3, 1e-2], metadata={"help": "The sweep, the same for every method."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds at the chosen learning rate; the first one sweeps."}
    )
    threads: int = field(default=1, metadata={"help": "Of torch."})


@dataclass(frozen=True)
class TrainingOptions:
    """What a trained model depends on, apart from method, learning rate and seed."""

    rank_ratio: float = field(default=0.25, metadata={"help": "Of every linear layer but the classifier."})
    conditioning_warmup: float = field(default=0.3, metadata={"help": "Share of the training until τ is reached."})
    validation_images: int = field(default=5000, metadata={"help": "Training images held out for the choice."})
    epochs: int = field(default=3, metadata={"help": "Passes over the training images."})
    batch_size: int = field(default=64, metadata={"help": "Images of one step."})


def build_model(method: str, seed: int, options: TrainingOptions) -> ViTForImageClassification:
    """A fresh model: for one seed the same weights for dense, and their truncation for all factored methods."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        num_labels=10,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
    )
    model = ViTForImageClassification(config)
    if method == "dense":
        return model
    factors = CondLRConfig(target_modules="all-linear", rank_ratio=options.rank_ratio, tau=tolerance(method))
    return get_robust_lowrank_model(model, factors)


def train(
    method: str, learning_rate: float, seed: int, data: dict[str, Split], options: TrainingOptions
) -> tuple[dict[str, Any], ViTForImageClassification]:
    """Train one model; returns what happened, and the model. A loss that is not finite ends the training."""
    model = build_model(method, seed, options)
    pixel_model = PixelModel(model, mean=MEAN, std=STD)  # normalisation is part of the attacked model
    steps = options.epochs * -(-len(data["train"].labels) // options.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
    if method not in ("dense", "unconstrained"):
        attach_manifold_step(optimizer, model, warmup_steps=round(options.conditioning_warmup * steps))
    order = torch.Generator().manual_seed(seed)  # of its own: each method sees the images in the same order
    start, losses = time.perf_counter(), []
    model.train()
    for epoch in range(options.epochs):
        losses.append(one_epoch(pixel_model, optimizer, data["train"], order, options.batch_size, schedule))
        logger.info("  %s lr=%g seed=%d epoch %d: loss %s", method, learning_rate, seed, epoch + 1, losses[-1])
        if losses[-1] is None:
            break
    model.eval()
    row = {
        "training_loss": losses,
        "diverged": losses[-1] is None,
        "training_seconds": round(time.perf_counter() - start, 1),
        "validation_accuracy": accuracy(pixel_model, data["validation"]),
        "condition_numbers": condition_numbers(model),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if hasattr(model, "condlr_config"):
        row["orthonormality_error"] = condition_report(model).max_orthonormality_error
    return row, model


class Experiment:
    """Runs what is missing, and remembers it in the output folder."""

    def __init__(self, options: Options, training: TrainingOptions) -> None:
        self.options, self.training = options, training
        self.folder = Path(options.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.trained = Rows(self.folder / "train.jsonl")
        self.data = load_mnist(training.validation_images)

    def train(self, method: str, learning_rate: float, seed: int) -> dict[str, Any]:
        """The row of one training; its model lies in the folder that `model` names."""
        settings = asdict(self.training)
        if method == "dense":  # does not depend on how factored ones are made
            del settings["rank_ratio"], settings["conditioning_warmup"]
        key = {"method": method, "learning_rate": learning_rate, "seed": seed, **settings}
        row = self.trained.find(key)
        if row is None:
            result, model = train(method, learning_rate, seed, self.data, self.training)
            name = f"{method}-lr{learning_rate:g}-seed{seed}-{digest(key)}"
            model.save_pretrained(self.folder / "models" / name)
            row = self.trained.add(key, result | {"model": f"models/{name}"})
            logger.info("%s lr=%g seed=%d: validation %.4f", method, learning_rate, seed, row["validation_accuracy"])
        return row

    def run(self) -> dict[str, Any]:
        """Sweep, choose, train the other seeds."""
        o = self.options
        sweep = {m: [self.train(m, rate, o.seeds[0]) for rate in sorted(o.learning_rates)] for m in o.methods}
        best = []
        for method, rows in sweep.items():
            chosen = max(rows, key=lambda row: row["validation_accuracy"])["key"]["learning_rate"]
            best += [self.train(method, chosen, seed) for seed in o.seeds]
        return {"best": best, "sweep": [row for rows in sweep.values() for row in rows]}


def main() -> None:
    """Run what is missing, print the sweep, write the record."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    options, training = HfArgumentParser((Options, TrainingOptions)).parse_args_into_dataclasses()
    torch.set_num_threads(options.threads)
    results = Experiment(options, training).run()
    print(sweep_table(results["sweep"], sorted(options.learning_rates)))
    print("wrote", write_record(Path(options.output_dir) / "results.json", results, options, training))


if __name__ == "__main__":
    main()
