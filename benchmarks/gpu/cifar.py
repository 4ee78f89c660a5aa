"""VGG16 on CIFAR-10: dense, free low rank, CondLR; accuracy, attacks at the published budgets, and time an epoch.

Every method gets the same learning rate, the same batches and as many epochs as fit into the given seconds, found by
timing a few steps of each: a first look with one seed and without a sweep, not the published 120 epochs. The images lie
on the device as 8-bit numbers and are cropped and flipped there; channels last, autocast to bfloat16. The attacked
model computes in float32, on the first test images.

    CONDLR_DATA=path/to/data python -m benchmarks.gpu.cifar --seconds 140
"""

from __future__ import annotations

import io
import math
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from benchmarks.models import worst_errors
from benchmarks.timing import CommonOptions, run
from hf_condlr import CondLRConfig, attach_manifold_step, get_robust_lowrank_model
from hf_condlr.options import option
from hf_condlr.robustness.attacks import FGSM, PGD, Attack, PixelModel
from hf_condlr.tables import markdown_table
from studies.record import any_device

WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
METHODS = {"dense": None, "low rank, U, S, V free": math.inf, "CondLR τ = 0.1": 0.1, "CondLR τ = 0.5": 0.5}
RANK_RATIO = 0.2  # "80 %" in the published tables is the share of the ranks that is taken away
ATTACKS: tuple[Attack, ...] = (
    *(FGSM(epsilon, clip=False) for epsilon in (0.002, 0.004, 0.006)),
    *(PGD(epsilon, "l2", steps=10) for epsilon in (0.1, 0.2, 0.3)),
)
Split = tuple[Tensor, Tensor]  # (N, 3, 32, 32) uint8, (N,)


@dataclass
class Options(CommonOptions):
    """What is trained."""

    seconds: float = option(140.0, "From here to the end, for all methods.")
    epochs: int | None = option(None, "Epochs, in place of as many as fit.")
    batch_size: int = option(256, "Images of one step.")
    learning_rate: float = option(0.1, "The largest one of SGD; it rises for a fifth of the training and falls to 0.")
    momentum: float = option(0.45, "Of SGD, as published.")
    images: int | None = option(None, "The first training and test images; all of them if not given.")
    attacked: int = option(2000, "Test images that are attacked.")
    width: float = option(1.0, "Share of VGG16's channels.")


def vgg16(width: float = 1.0) -> nn.Sequential:
    """13 convolutions 3×3 with batch normalisation and 3 linear layers, for images of 32×32."""
    layers: list[nn.Module] = []
    channels = 3
    for block in WIDTHS:
        for full in block:
            size = max(4, round(width * full))
            layers += [nn.Conv2d(channels, size, 3, padding=1, bias=False), nn.BatchNorm2d(size), nn.ReLU(inplace=True)]
            channels = size
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for _ in range(2):
        layers += [nn.Linear(channels, channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(channels, 10))


def build(tau: float | None, options: Options, device: torch.device) -> nn.Module:
    """The model of a method: dense, or all layers at `RANK_RATIO` from random factors, the last one at full rank."""
    torch.manual_seed(0)
    model: nn.Module = vgg16(options.width).to(device)
    if tau is not None:
        names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        config = CondLRConfig(
            target_modules=names,
            rank_ratio=RANK_RATIO,
            rank_pattern={names[-1]: 1.0},
            tau=tau,
            init_weights="orthogonal",
        )
        model = get_robust_lowrank_model(model, config)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def load(split: str, count: int | None, device: torch.device) -> Split:
    """The images and labels of a parquet file of the Hub's `uoft-cs/cifar10`, on the device."""
    folder = os.environ.get("CONDLR_DATA")
    path = Path(folder or ".", "cifar10", f"{split}.parquet")
    if not path.is_file():
        sys.exit(f"No {path}: set CONDLR_DATA to the folder that holds cifar10/train.parquet and cifar10/test.parquet.")
    rows = pyarrow.parquet.read_table(path).slice(0, count).to_pydict()
    pictures = rows.get("img") or rows["image"]
    with ThreadPoolExecutor() as threads:
        pixels = list(
            threads.map(lambda cell: np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")), pictures)
        )
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return images.to(device), torch.tensor(rows["label"], device=device)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:  # (B, 3, 32, 32) uint8 -> float32
    """Normalised random crops of images with a border of 4 pixels, half of them flipped; nothing leaves the device."""
    batch, size = len(images), images.shape[-1]
    device = images.device
    top, left = torch.randint(0, 9, (2, batch, 1), device=device, generator=generator)
    flip = torch.rand(batch, 1, device=device, generator=generator) < 0.5
    step = torch.arange(size, device=device)
    rows, columns = top + step, left + torch.where(flip, size - 1 - step, step)
    padded = F.pad(images, (4, 4, 4, 4))
    batches = torch.arange(batch, device=device)[:, None, None]
    crops = padded.permute(0, 2, 3, 1)[batches, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return normalised(crops)


def normalised(images: Tensor) -> Tensor:  # uint8 -> float32
    """What the model sees; channels last."""
    mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in (MEAN, STD))
    return ((images.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


class Training:
    """One method's model, optimizer and batches."""

    def __init__(self, tau: float | None, options: Options, device: torch.device) -> None:
        self.options, self.device = options, device
        self.model = build(tau, options, device)
        values = {"lr": options.learning_rate, "momentum": options.momentum, "weight_decay": 5e-4}
        self.optimizer = torch.optim.SGD(self.model.parameters(), **values)
        bounded = tau is not None and math.isfinite(tau)
        self.handle = attach_manifold_step(self.optimizer, self.model) if bounded else None
        self.generator = torch.Generator(device).manual_seed(0)

    def steps(self, train: Split, count: int | None = None) -> Tensor:
        """Up to `count` steps of one epoch; the last loss, on the device."""
        images, labels = train
        order = torch.randperm(len(labels), device=self.device, generator=self.generator)
        size = min(self.options.batch_size, len(labels))
        for index in order.split(size)[: len(labels) // size][:count]:
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = F.cross_entropy(self.model(augmented(images[index], self.generator)), labels[index])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return loss.detach()

    def fit(self, train: Split, epochs: int) -> dict[str, Any]:
        """Train; losses at the ends of epochs and seconds."""
        per_epoch = max(1, len(train[1]) // min(self.options.batch_size, len(train[1])))
        steps, start, losses = epochs * per_epoch, time.perf_counter(), []
        for epoch in range(epochs):
            done = (epoch + 0.5) * per_epoch / steps  # the rate changes from epoch to epoch
            rate = self.options.learning_rate * min(1.0, 5 * done, (1 - done) / 0.8)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            losses.append(self.steps(train).item())
        if self.handle:
            self.handle.check()
        return {"epochs": epochs, "losses": losses, "seconds_an_epoch": (time.perf_counter() - start) / epochs}


def accuracy(model: nn.Module, data: Split) -> float:
    """Share of pixels (N, 3, 32, 32) in [0, 1] classified correctly."""
    with torch.inference_mode():
        right = [
            (model(x).argmax(-1) == y).sum() for x, y in zip(data[0].split(1000), data[1].split(1000), strict=True)
        ]
    return (torch.stack(right).sum() / len(data[1])).item()


def evaluate(model: nn.Module, test: Split, attacked: int) -> dict[str, float]:
    """Clean accuracy, and that under each attack, in percent."""
    wrapped = PixelModel(model.eval().requires_grad_(False), MEAN, STD)
    images, labels = test[0].float() / 255, test[1]
    found = {"clean": accuracy(wrapped, (images, labels))}
    images, labels = images[:attacked], labels[:attacked]
    for attack in ATTACKS:
        batches = zip(images.split(500), labels.split(500), strict=True)
        adversarial = torch.cat([attack(wrapped, x, y).detach() for x, y in batches])
        found[f"{attack.name} {attack.epsilon:g}"] = accuracy(wrapped, (adversarial, labels))  # type: ignore[attr-defined]
    return {name: 100 * value for name, value in found.items()}


def epochs_that_fit(options: Options, train: Split, deadline: float, device: torch.device) -> int:
    """Epochs of every method in three quarters of the time that is left: the rest is for attacks and for errors."""
    total, count = 0.0, 12
    for tau in METHODS.values():
        training = Training(tau, options, device)
        training.steps(train, 3).item()
        start = time.perf_counter()
        training.steps(train, count).item()
        total += (time.perf_counter() - start) / count * len(train[1]) / options.batch_size
    return max(1, min(120, int(0.75 * (deadline - time.perf_counter()) / total)))


def measure(options: Options) -> Iterator[dict[str, dict[str, Any]]]:
    """Results of more and more methods."""
    deadline, device = time.perf_counter() + options.seconds, any_device()
    torch.backends.cudnn.benchmark = True
    train, test = load("train", options.images, device), load("test", options.images, device)
    epochs = options.epochs or epochs_that_fit(options, train, deadline, device)
    results: dict[str, dict[str, Any]] = {}
    for name, tau in METHODS.items():
        training = Training(tau, options, device)
        result = training.fit(train, epochs)
        result["parameters"] = sum(p.numel() for p in training.model.parameters())
        if training.handle:
            worst = worst_errors(training.handle.layers)
            result |= dict(zip(("orthonormality", "kappa_over_bound"), worst, strict=True))
        result["losses"] = [x if math.isfinite(x) else None for x in result["losses"]]
        results[name] = result | {"accuracy": evaluate(training.model, test, options.attacked)}
        yield results


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each method."""
    names = list(next(iter(results.values()))["accuracy"])
    lines = []
    for method, result in results.items():
        facts = [method, f"{result['parameters'] / 1e6:.2f}", f"{result['seconds_an_epoch']:.2f}"]
        lines.append([*facts, *(f"{result['accuracy'][name]:.1f}" for name in names)])
    epochs = next(iter(results.values()))["epochs"]
    header = [f"VGG16, {epochs} epochs", "M parameters", "s an epoch", *names]
    return markdown_table(header, lines, align="lr")


if __name__ == "__main__":
    run(Options, measure, table)
