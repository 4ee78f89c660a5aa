"""A small ViT on MNIST, from scratch: dense, low rank without constraint, and low rank with κ ≤ 1 + τ.

28×28 pixels, patches of 7, 4 layers of 4 heads and width 96: 450,000 parameters. The factored methods keep a rank ratio
of 0.25 in every linear layer but the classifier, from the truncated SVD of the same fresh weights as the dense model.
AdamW without weight decay (it would act on W in one model and on S in another), linear warm-up, cosine schedule.

The rules are those of `studies.rows.sweep`, but no model meets the test split here: `studies.robustness_study` attacks
them.

    CONDLR_DATA=path/to/data python -m studies.vit_small
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    get_cosine_schedule_with_warmup,
)

from hf_condlr import CondLRConfig, attach_manifold_step, get_robust_lowrank_model
from hf_condlr.options import option
from hf_condlr.robustness.attacks import PixelModel
from studies.data import Split, hold_out, load_images, pixel_model
from studies.paper.methods import Method
from studies.paper.training import fit
from studies.record import parse, set_up, write_record
from studies.report import tables
from studies.rows import Rows, sweep

RANK_RATIO = 0.25
CONDITIONING_WARMUP = 0.3  # share of the training until τ is reached
VALIDATION_IMAGES = 5000


@dataclass
class Options:
    """What the experiment varies, and where it writes."""

    methods: list[str] = option(["dense", "unconstrained", "tau=0.1"], "dense, unconstrained, or tau=NUMBER.")
    learning_rates: list[float] = option([3e-4, 1e-3, 3e-3, 1e-2], "The sweep, the same for every method.")
    seeds: list[int] = option([0, 1, 2], "Seeds at the chosen learning rate; the first one sweeps.")
    epochs: int = option(3, "Passes over the training images.")
    batch_size: int = option(64, "Images of one step.")
    threads: int = option(1, "Threads of torch.")
    output_dir: str = option("outputs/vit_mnist", "Where rows and results go.")

    def __post_init__(self) -> None:
        for method in self.methods:
            if Method.parse(method).kind not in ("dense", "unconstrained", "tau"):
                raise ValueError(f"a method must be dense, unconstrained or tau=NUMBER; received {method!r}")


def build_model(method: Method, seed: int) -> ViTForImageClassification:
    """A fresh model: for one seed the same weights for dense, and their truncation for all factored methods."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(image_size=28, patch_size=7, num_channels=1, num_labels=10, **sizes))
    if method.kind == "dense":
        return model
    return get_robust_lowrank_model(
        model, CondLRConfig(target_modules="all-linear", rank_ratio=RANK_RATIO, tau=method.tau)
    )


def load_trained(folder: str | Path) -> PixelModel:
    """The model of a row, in evaluation mode, behind the normalisation of its pixels."""
    return pixel_model(AutoModelForImageClassification.from_pretrained(folder).eval())


class Experiment:
    """Trains what is missing, and keeps it in the output folder."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.rows = Rows(Path(options.output_dir) / "rows")

    @cached_property
    def data(self) -> dict[str, Split]:
        """Train, validation and test; the validation images are the same for every seed, method and learning rate."""
        splits = load_images()
        splits["train"], splits["validation"] = hold_out(splits["train"], VALIDATION_IMAGES)
        return splits

    def train(self, name: str, learning_rate: float, seed: int) -> dict[str, Any]:
        """The row of one training; its model lies in its folder."""
        method, o = Method.parse(name), self.options
        facts = {"method": name, "learning_rate": learning_rate, "seed": seed}

        def make(folder: Path) -> dict[str, Any]:
            model = build_model(method, seed)
            steps = o.epochs * -(-len(self.data["train"].labels) // o.batch_size)
            optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
            schedule = get_cosine_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
            handle, warmup = None, round(CONDITIONING_WARMUP * steps)
            if method.has_step:
                handle = attach_manifold_step(optimizer, model, warmup_steps=warmup)
            result = fit(
                pixel_model(model),
                optimizer,
                schedule,
                handle,
                self.data,
                epochs=o.epochs,
                batch_size=o.batch_size,
                seed=seed,
                folder=folder,
            )
            model.save_pretrained(folder)
            kappa = result["condition_numbers"]  # of the encoder's linear layers, in which the methods differ
            result["condition_numbers"] = {name: value for name, value in kappa.items() if ".layers." in name}
            return {"label": method.label, **facts, **result}

        key = facts | {"epochs": o.epochs, "batch_size": o.batch_size}
        return self.rows.row(f"{name} lr {learning_rate:g} seed {seed}", key, make)


def main() -> None:
    """Run what is missing, print the tables, write the record."""
    (options,) = parse(Options)
    set_up(options.threads)
    train = Experiment(options).train
    results = sweep(options.methods, options.learning_rates, options.seeds, train=train, test=lambda *row: {})
    print(tables("A small ViT on MNIST", results, [], options.learning_rates))
    print("\nwrote", write_record(Path(options.output_dir) / "results.json", results, options))


if __name__ == "__main__":
    main()
