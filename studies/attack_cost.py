"""What PGD costs over the bare forward and backward passes that it consists of, on 1,000 images.

PGD-20 makes 20 passes forward and backward, and two forward: of the inputs as they are, and of the last iterate. Both
are timed batch by batch in turn, so that a noisy machine meets them alike; the ratio of the sums over all batches is
taken for each round. `early_stop` is off: it saves passes, and how many depends on the model.

    python -m studies.attack_cost
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, set_seed

from benchmarks.timing import ratios, seconds, spread
from hf_condlr.robustness.attacks import PGD, EmbeddingPGD, PixelModel, TextModel
from hf_condlr.robustness.attacks.base import Inputs, attacked
from hf_condlr.tables import markdown_table
from studies.paper.networks import LeNet5
from studies.record import option, parse, set_up, write_record
from studies.vit_small import Variant, build_model


@dataclass
class Options:
    """What is measured."""

    samples: int = option(1000, "Images or texts attacked in a round.")
    batch_size: int = option(100, "Samples attacked together.")
    steps: int = option(20, "Gradient steps of PGD.")
    rounds: int = option(3, "Times that all samples are attacked.")
    threads: int = option(1, "Threads of torch.")
    output: str = option("outputs/attack_cost.json", "Where the record goes.")


def bert() -> TextModel:
    """A small BERT."""
    config = BertConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512)
    return TextModel(BertForSequenceClassification(config))


def pixel_passes(model: nn.Module, x: Tensor, labels: Tensor, steps: int) -> None:
    """The bare passes of an attack on pixels."""
    for _ in range(steps):
        leaf = x.detach().requires_grad_(True)
        torch.autograd.grad(F.cross_entropy(model(leaf), labels, reduction="sum"), leaf)
    with torch.no_grad():
        model(x), model(x)


def embedding_passes(model: nn.Module, batch: dict[str, Tensor], labels: Tensor, steps: int) -> None:
    """The bare passes of an attack on embeddings, δ added by the same hook."""
    delta = torch.zeros(*batch["input_ids"].shape, model.model.config.hidden_size)
    for _ in range(steps):
        leaf = delta.detach().requires_grad_(True)
        batch = batch | {"perturbation": leaf}
        torch.autograd.grad(F.cross_entropy(model(batch), labels, reduction="sum"), leaf)
    with torch.no_grad():
        model(batch), model(batch)


# {model: how it is built}; what a pass costs does not depend on the weights.
CASES: dict[str, Callable[[], nn.Module]] = {
    "LeNet5, 28×28 pixels": lambda: PixelModel(LeNet5()),
    "ViT (4 layers, width 96), 28×28 pixels": lambda: PixelModel(build_model(Variant("dense"), "mnist", 0), 0.5, 0.5),
    "BERT (2 layers, width 128), 24 tokens": bert,
}


def measure(name: str, o: Options) -> dict[str, list[float]]:
    """Seconds of both in every round."""
    set_seed(0)
    model, device = CASES[name]().eval(), torch.device("cpu")
    of_text, common = isinstance(model, TextModel), {"steps": o.steps, "early_stop": False}
    attack = EmbeddingPGD(0.02, **common) if of_text else PGD(8 / 255, **common)
    passes = embedding_passes if of_text else pixel_passes
    times: dict[str, list[float]] = {"attack": [], "passes": []}
    for _ in range(o.rounds):
        total = dict.fromkeys(times, 0.0)
        for start in range(0, o.samples, o.batch_size):
            count = min(o.batch_size, o.samples - start)
            y, x = torch.randint(0, 2, (count,)), torch.rand(count, 1, 28, 28)
            if of_text:
                ids = torch.randint(1000, 30_000, (count, 24))
                x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            batch: Inputs = x
            total["attack"] += seconds(partial(attack, model, batch, y), device)
            with attacked(model):
                total["passes"] += seconds(partial(passes, model, batch, y, o.steps), device)
        for kind, value in total.items():
            times[kind].append(value)
    return times


def main() -> None:
    """Measure, print, write."""
    (options,) = parse(Options)
    set_up(options.threads)
    results = {name: measure(name, options) for name in CASES}
    rows = [
        [
            name,
            *(f"{statistics.median(times[kind]):.2f}" for kind in ("passes", "attack")),
            spread(ratios(times["attack"], times["passes"]), 3),
        ]
        for name, times in results.items()
    ]
    print(markdown_table(["model", "bare passes, s", "attack, s", "attack / passes"], rows))
    print("\nwrote", write_record(options.output, {"seconds": results}, options))


if __name__ == "__main__":
    main()
