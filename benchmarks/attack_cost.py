"""What PGD costs over the bare forward and backward passes that it consists of, on 1,000 images.

PGD-20 makes 20 passes forward and backward, and two forward: of the inputs as they are, and of the last iterate. Both
are timed batch by batch in turn, so that a noisy machine meets them alike; the ratio of the sums over all batches is
taken for each round. `early_stop` is off: it saves passes, and how many depends on the model.

    python benchmarks/attack_cost.py
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from lenet5_parts import LeNet5
from record import markdown, write_record
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    HfArgumentParser,
    set_seed,
)
from vit_parts import TrainingOptions, build_model

from hf_condlr.robustness.attacks import PGD, EmbeddingPGD, PixelModel, TextModel
from hf_condlr.robustness.attacks.base import Attack, Inputs, attacked


@dataclass
class Options:
    """The experiment."""

    samples: int = field(default=1000, metadata={"help": "Images or texts attacked in a round."})
    batch_size: int = field(default=100, metadata={"help": "Of them together."})
    steps: int = field(default=20, metadata={"help": "Gradient steps of PGD."})
    rounds: int = field(default=3, metadata={"help": "Times that all samples are attacked."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    output: str = field(default="outputs/attack_cost.json", metadata={"help": "Where the record goes."})


def vit() -> PixelModel:
    """The ViT that the study trains on MNIST."""
    return PixelModel(build_model("dense", 0, TrainingOptions()), 0.5, 0.5)


def bert() -> TextModel:
    """A small BERT."""
    config = BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512)
    return TextModel(BertForSequenceClassification(config))


def images(samples: int) -> Tensor:  # -> (N, 1, 28, 28)
    """Noise: what a pass costs does not depend on the values."""
    return torch.rand(samples, 1, 28, 28)


def tokens(samples: int) -> Tensor:  # -> (N, 24)
    """Random token ids."""
    return torch.randint(1000, 30_000, (samples, 24))


def pgd(steps: int) -> Attack:
    """On pixels."""
    return PGD(8 / 255, steps=steps, early_stop=False)


def embedding_pgd(steps: int) -> Attack:
    """On embeddings."""
    return EmbeddingPGD(0.02, steps=steps, early_stop=False)


def pixel_passes(model: nn.Module, x: Tensor, labels: Tensor, steps: int) -> None:
    """The bare passes of an attack on pixels."""
    for _ in range(steps):
        leaf = x.detach().requires_grad_(True)
        torch.autograd.grad(F.cross_entropy(model(leaf), labels, reduction="sum"), leaf)
    with torch.no_grad():
        model(x), model(x)


def embedding_passes(model: nn.Module, ids: Tensor, labels: Tensor, steps: int) -> None:
    """The bare passes of an attack on embeddings, δ added by the same hook."""
    delta = torch.zeros(*ids.shape, model.model.config.hidden_size)
    for _ in range(steps):
        leaf = delta.detach().requires_grad_(True)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "perturbation": leaf}
        torch.autograd.grad(F.cross_entropy(model(batch), labels, reduction="sum"), leaf)
    with torch.no_grad():
        model(batch), model(batch)


CASES: dict[str, tuple[Callable, Callable, Callable, Callable]] = {
    "LeNet5, 28×28 pixels": (lambda: PixelModel(LeNet5("paper")), images, pgd, pixel_passes),
    "ViT (4 layers, width 96), 28×28 pixels": (vit, images, pgd, pixel_passes),
    "BERT (2 layers, width 128), 24 tokens": (bert, tokens, embedding_pgd, embedding_passes),
}


def timed(run: Callable[[], object]) -> float:
    """Seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, options: Options) -> dict[str, list[float]]:
    """Seconds of both in every round."""
    build, draw, make_attack, passes = CASES[name]
    set_seed(0)
    model, attack = build().eval(), make_attack(options.steps)
    data, labels = draw(options.samples), torch.randint(0, 2, (options.samples,))
    seconds: dict[str, list[float]] = {"attack": [], "passes": []}
    for _ in range(options.rounds):
        total = dict.fromkeys(seconds, 0.0)
        for index in torch.arange(options.samples).split(options.batch_size):
            x, y = data[index], labels[index]
            batch: Inputs = {"input_ids": x, "attention_mask": torch.ones_like(x)} if x.dim() == 2 else x
            total["attack"] += timed(lambda batch=batch, y=y: attack(model, batch, y))
            with attacked(model):
                total["passes"] += timed(lambda x=x, y=y: passes(model, x, y, options.steps))
        for kind, value in total.items():
            seconds[kind].append(value)
    return seconds


def main() -> None:
    """Measure, print, write."""
    options: Options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]  # type: ignore[arg-type]
    torch.set_num_threads(options.threads)
    results, rows = {}, []
    for name in CASES:
        results[name] = seconds = measure(name, options)
        ratios = sorted(a / b for a, b in zip(seconds["attack"], seconds["passes"], strict=True))
        rows.append(
            [
                name,
                f"{statistics.median(seconds['passes']):.2f}",
                f"{statistics.median(seconds['attack']):.2f}",
                f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})",
            ]
        )
    path = write_record(Path(options.output), {"seconds": results}, options)
    header = ["model", "bare passes, s", "attack, s", "attack / passes"]
    sys.stdout.write(f"{markdown(header, rows)}\n\nwrote {path}\n")


if __name__ == "__main__":
    main()
