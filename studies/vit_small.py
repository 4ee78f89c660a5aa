r"""A small ViT on MNIST or CIFAR-10, from scratch: dense, low rank without constraint, and low rank with κ ≤ 1 + τ.

4 layers of 4 heads. MNIST: grey 28x28 images, patches of 7, width 96, 450,000 parameters. CIFAR-10: 32x32, patches of
8, width 128, 820,000 parameters; training images are mirrored and shifted. The factored methods keep a rank ratio of
0.25 in every linear layer but the classifier, or remove a share of those layers' weights (`compression_ratios`), from
the truncated SVD of the same fresh weights as the dense model. AdamW without weight decay (it would act on W in one
model and on S in another), linear warm-up, cosine schedule.

The rules are those of `studies.rows.sweep`. Without `--epsilons` no model meets the test split here:
`studies.robustness_study` attacks them.

    CONDLR_DATA=path/to/data python -m studies.vit_small --learning_rates 3e-4 1e-3 3e-3 1e-2
    CONDLR_DATA=path/to/data python -m studies.vit_small --dataset cifar10 --compression_ratios 0.6 0.8 \
        --train_images 30000 --epochs 2 --batch_size 128 --learning_rates 2e-4 8e-4 3.2e-3 1.28e-2 5.12e-2 \
        --epsilons 1/255 2/255 4/255
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
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
from hf_condlr.robustness.attacks import PixelModel, make_attacks
from studies.data import PIXELS, Split, hold_out, load_images
from studies.paper.methods import Method
from studies.paper.training import fit
from studies.record import option, parse, set_up, write_record
from studies.report import tables
from studies.rows import Rows, attacked, sweep

SHAPES = {
    "mnist": {"image_size": 28, "patch_size": 7, "num_channels": 1, "hidden_size": 96},
    "cifar10": {"image_size": 32, "patch_size": 8, "num_channels": 3, "hidden_size": 128},
}
RANK_RATIO = 0.25  # where no share of the weights to remove is given
CONDITIONING_WARMUP = 0.3  # share of the training until τ is reached
VALIDATION_IMAGES, TEST_IMAGES = 5000, 1000  # of the test images, the first ones are attacked


@dataclass(frozen=True)
class TrainingOptions:
    """What a trained model depends on, apart from method, learning rate and seed."""

    dataset: str = option("mnist", "Which images.", choices=list(SHAPES))
    train_images: int | None = option(None, "Number of training images; all but those for validation if not given.")
    epochs: int = option(3, "Passes over the training images.")
    batch_size: int = option(64, "Images of one step.")


@dataclass
class Options:
    """What the experiment varies, and where it writes."""

    output_dir: str = option("outputs", "Rows and results go to vit_DATASET in this folder.")
    methods: list[str] = option(["dense", "unconstrained", "tau=0.1"], "dense, unconstrained, or tau=NUMBER.")
    compression_ratios: list[float] = option([], "Shares of the weights to remove; rank ratio 0.25 if none is given.")
    learning_rates: list[float] = option([1e-3, 3e-3, 1e-2], "The sweep, the same for every method.")
    seeds: list[int] = option([0, 1, 2], "Seeds at the chosen learning rate; the first one sweeps.")
    epsilons: list[str] = option([], "ℓ∞ radii, in pixels of [0, 1], of FGSM and of PGD with two losses.")
    check_samples: int = option(64, "Images of the checks, for the first seed.")
    threads: int = option(1, "Threads of torch.")

    def __post_init__(self) -> None:
        for method in self.methods:
            if Method.parse(method).kind not in ("dense", "unconstrained", "tau"):
                raise ValueError(f"a method must be dense, unconstrained or tau=NUMBER; received {method!r}")


@dataclass(frozen=True)
class Variant:
    """A line of the table: a method, and the share of the weights that it removes, if one is given."""

    method: str
    compression_ratio: float | None = None

    @property
    def label(self) -> str:
        """The line's first cell."""
        removed = "" if self.compression_ratio is None else f", {100 * self.compression_ratio:g} % removed"
        return Method.parse(self.method).label + removed


def build_model(variant: Variant, dataset: str, seed: int) -> ViTForImageClassification:
    """A fresh model: for one seed the same weights for dense, and their truncation for all factored methods."""
    torch.manual_seed(seed)
    shape = SHAPES[dataset]
    blocks = {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 4 * shape["hidden_size"]}
    model = ViTForImageClassification(ViTConfig(**shape, **blocks, num_labels=10))
    if variant.method == "dense":
        return model
    removed = variant.compression_ratio
    config = CondLRConfig(
        target_modules="all-linear",
        rank_ratio=RANK_RATIO if removed is None else None,
        compression_ratio=removed,
        tau=Method.parse(variant.method).tau,
    )
    return get_robust_lowrank_model(model, config)


def load_trained(folder: str | Path, dataset: str) -> PixelModel:
    """The model of a row, in evaluation mode, behind the normalisation of its pixels."""
    mean, std = PIXELS[dataset]
    return PixelModel(AutoModelForImageClassification.from_pretrained(folder).eval(), mean=mean, std=std)


class Experiment:
    """Trains and attacks what is missing, and keeps it in the output folder."""

    def __init__(self, options: Options, training: TrainingOptions) -> None:
        self.options, self.training = options, training
        self.folder = Path(options.output_dir) / f"vit_{training.dataset}"
        self.rows = Rows(self.folder / "rows")
        names = ["fgsm", "pgd-linf", "pgd-linf-margin"]
        self.attacks = make_attacks(names, options.epsilons, steps=10) if options.epsilons else []

    @cached_property
    def data(self) -> dict[str, Split]:
        """Train, validation and test; the validation images are the same for every seed, method and learning rate."""
        splits = load_images(self.training.dataset)
        train, splits["validation"] = hold_out(splits["train"], VALIDATION_IMAGES)
        splits["train"] = train.take(torch.arange(len(train.labels))[: self.training.train_images])
        return splits

    def variants(self) -> Iterator[Variant]:
        """The methods, each factored one with each share of the weights to remove."""
        for method in self.options.methods:
            if method == "dense" or not self.options.compression_ratios:
                yield Variant(method)
            else:
                yield from (Variant(method, ratio) for ratio in self.options.compression_ratios)

    def train(self, variant: Variant, learning_rate: float, seed: int) -> dict[str, Any]:
        """The row of one training; its model lies in its folder."""
        facts = {**asdict(variant), "learning_rate": learning_rate, "seed": seed}

        def make(folder: Path) -> dict[str, Any]:
            o, images = self.training, len(self.data["train"].labels)
            model = build_model(variant, o.dataset, seed)
            steps = o.epochs * -(-images // o.batch_size)
            optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
            schedule = get_cosine_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
            handle, warmup = None, round(CONDITIONING_WARMUP * steps)
            if Method.parse(variant.method).has_step:
                handle = attach_manifold_step(optimizer, model, warmup_steps=warmup)
            mean, std = PIXELS[o.dataset]
            result = fit(
                PixelModel(model, mean=mean, std=std),
                optimizer,
                schedule,
                handle,
                self.data,
                epochs=o.epochs,
                batch_size=o.batch_size,
                seed=seed,
                augment=o.dataset == "cifar10",
                folder=folder,
            )
            model.save_pretrained(folder)
            kappa = result["condition_numbers"]  # of the encoder's linear layers, in which the methods differ
            result["condition_numbers"] = {name: value for name, value in kappa.items() if ".layers." in name}
            return {"label": variant.label, **facts, **result}

        return self.rows.row(f"{variant.label} lr {learning_rate:g} seed {seed}", facts | asdict(self.training), make)

    def test(self, variant: Variant, learning_rate: float, seed: int) -> dict[str, Any]:
        """Accuracy on the first test images, clean and attacked; nothing without attacks."""
        row, o = self.train(variant, learning_rate, seed), self.options
        if not self.attacks:
            return {}
        return attacked(
            Path(row["folder"]),
            variant.label,
            self.attacks,
            TEST_IMAGES,
            build=lambda: load_trained(row["folder"], self.training.dataset),
            data=lambda: self.data["test"].first(TEST_IMAGES),
            batch_size=100,
            checks=seed == o.seeds[0],
            check_samples=o.check_samples,
        )


def main() -> None:
    """Run what is missing, print the tables, write the record."""
    options, training = parse(Options, TrainingOptions)
    set_up(options.threads)
    experiment = Experiment(options, training)
    results = sweep(
        experiment.variants(), options.learning_rates, options.seeds, train=experiment.train, test=experiment.test
    )
    print(tables(f"ViT on {training.dataset}", results, experiment.attacks, options.learning_rates))
    print("\nwrote", write_record(experiment.folder / "results.json", results, options, training))


if __name__ == "__main__":
    main()
