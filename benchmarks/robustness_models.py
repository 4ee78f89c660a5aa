"""The trained models that `robustness_study.py` attacks: chosen by their benchmarks on clean validation data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from lenet5_parts import MEAN, STD, TrainingOptions, build_model
from record import method_label
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer

from hf_condlr import condition_report, is_factored
from hf_condlr.robustness.attacks import PixelModel, TextModel


@dataclass(frozen=True)
class Trained:
    """One training at the learning rate that validation chose for its method."""

    method: str
    seed: int
    learning_rate: float
    path: Path
    build: Callable[[], nn.Module]
    """Yields a `PixelModel` or a `TextModel`."""

    def facts(self) -> dict[str, Any]:
        """Learning rate, size and largest condition number."""
        model: Any = self.build().model
        return {
            "method": self.method,
            "seed": self.seed,
            "learning_rate": self.learning_rate,
            "parameters": sum(p.numel() for p in model.parameters()),
            "largest_kappa": largest_kappa(model),
            "model": str(self.path),
        }


def largest_kappa(model: Any) -> float | None:
    """Of the factored layers, over their r singular values; in a dense model of all its layers; None if infinite."""
    if is_factored(model):
        kappa = condition_report(model).max_condition_number
    else:
        weights = [m.weight.detach().flatten(1) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        values = [torch.linalg.svdvals(W.double()) for W in weights]
        kappa = max((sigma[0] / sigma[-1]).item() for sigma in values)
    return kappa if math.isfinite(kappa) else None


def lenet5(record: Path, seeds: Sequence[int]) -> Iterator[Trained]:
    """Of `lenet5_mnist.py`."""
    names = {field.name for field in fields(TrainingOptions)}
    for row in json.loads(record.read_text())["best"]:
        key, path = row["key"], record.parent / row["weights"]
        options = TrainingOptions(**{name: value for name, value in key.items() if name in names})

        def build(key: dict[str, Any] = key, path: Path = path, options: TrainingOptions = options) -> nn.Module:
            model = build_model(key["method"], key["seed"], options)
            model.load_state_dict(torch.load(path, weights_only=True))
            return PixelModel(model.eval(), mean=MEAN, std=STD)

        if key["seed"] in seeds:
            yield Trained(method_label(key["method"]), key["seed"], key["learning_rate"], path, build)


def vit(record: Path, seeds: Sequence[int]) -> Iterator[Trained]:
    """Of `vit_small.py`; the factored checkpoints load because hf_condlr is imported."""
    for row in json.loads(record.read_text())["best"]:
        key, path = row["key"], record.parent / row["model"]

        def build(path: Path = path) -> nn.Module:
            return PixelModel(AutoModelForImageClassification.from_pretrained(path).eval(), mean=MEAN, std=STD)

        if key["seed"] in seeds:
            yield Trained(method_label(key["method"]), key["seed"], key["learning_rate"], path, build)


def minilm(record: Path, seeds: Sequence[int]) -> Iterator[Trained]:
    """Of `text_study.py`."""
    written = json.loads(record.read_text())
    for name, rows in written["results"].items():
        label = name.partition(" ")[2].replace("τ =", "CondLR τ =")  # behind the share removed
        for row in rows:
            key = row["key"]
            path = record.parent / row["model"]

            def build(path: Path = path) -> nn.Module:
                model = AutoModelForSequenceClassification.from_pretrained(path).eval()
                limit = written["options"]["max_length"]
                return TextModel(model, AutoTokenizer.from_pretrained(path), max_length=limit)

            if key["seed"] in seeds:
                yield Trained(label, key["seed"], key["learning_rate"], path, build)
