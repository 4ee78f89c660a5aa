"""What settings that change the arithmetic of a training do to the constraint: a table, a line for each setting.

Every setting trains the same factored encoder on the same batches with AdamW, the first third of the steps as warm-up.
Of every step: the largest κ(S) over its bound, the largest ‖UᵀU − I‖_F/√r of a basis; at the end the distance of all W
from those of the float32 training, over their norm. Last, what parameters in bfloat16 would hold: the factors of the
float32 training, rounded after each of its exact steps, and the share of entries that a step's update is too small to
change.

    python -m benchmarks.precision
    python -m benchmarks.precision --settings float32 compiled "compiled optimizer.step"

The 8-bit optimizers are those of bitsandbytes and torchao, where these are installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import batch_for, build, factor, worst_errors
from benchmarks.timing import CommonOptions, any_device, run
from hf_condlr import attach_manifold_step
from hf_condlr.layers import factored_layers
from hf_condlr.tables import markdown_table
from studies.record import option


@dataclass
class Setting:
    """How a training computes, where it is not plain float32."""

    autocast: torch.dtype | None = None
    scaler: bool = False
    fused: bool = False
    prepare: Callable[[Any], Any] = lambda model: None
    compiled: str = ""  # model or step
    optimizer: str = ""  # module.class
    matmul: str = "highest"


def _half_but_factors(model: Any) -> None:
    model.bfloat16()
    for layer in factored_layers(model).values():
        layer.float()


SETTINGS = {
    "float32": Setting(),
    "bfloat16 autocast": Setting(autocast=torch.bfloat16),
    "float16 autocast, GradScaler": Setting(autocast=torch.float16, scaler=True),
    "float16 autocast, GradScaler, fused": Setting(autocast=torch.float16, scaler=True, fused=True),
    "bfloat16 model, float32 factors": Setting(autocast=torch.bfloat16, prepare=_half_but_factors),
    "float32_matmul_precision medium": Setting(matmul="medium"),
    "gradient checkpointing": Setting(prepare=lambda model: model.activation_checkpointing_enable()),
    "compiled": Setting(compiled="model"),
    "compiled optimizer.step": Setting(compiled="step"),
    "AdamW8bit (bitsandbytes)": Setting(optimizer="bitsandbytes.optim.AdamW8bit"),
    "PagedAdamW8bit (bitsandbytes)": Setting(optimizer="bitsandbytes.optim.PagedAdamW8bit"),
    "AdamW8bit (torchao)": Setting(optimizer="torchao.optim.AdamW8bit"),
    "AdamW4bit (torchao)": Setting(optimizer="torchao.optim.AdamW4bit"),
}
ROUNDED = "bfloat16 parameters (rounded)"


@dataclass
class Options(CommonOptions):
    """What is measured."""

    settings: list[str] = option(list(SETTINGS), ", ".join(SETTINGS))
    model: str = option("minilm", "minilm, vit-b16 or tiny, with random weights.")
    layers: int = option(2, "Blocks of the model.")
    steps: int = option(30, "Steps of each training.")


COMPRESSION_RATIO, LEARNING_RATE, BATCH_SIZE, TOKENS = 0.5, 1e-3, 8, 32
SCALE = 2.0**20  # where the gradient scaler starts: it skips some steps


class Training:
    """One setting; the worst of what its steps left."""

    def __init__(self, setting: Setting, options: Options, device: torch.device) -> None:
        torch.manual_seed(0)
        self.setting, self.options, self.device = setting, options, device
        self.model = factor(build(options.model, options.layers), COMPRESSION_RATIO).to(device)
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        setting.prepare(self.model)
        self.optimizer = self._optimizer()
        warmup = options.steps // 3
        self.handle = attach_manifold_step(self.optimizer, self.model, warmup_steps=warmup)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=SCALE) if setting.scaler else None
        self.forward = torch.compile(self.model) if setting.compiled == "model" else self.model
        self.step = torch.compile(self.optimizer.step) if setting.compiled == "step" else self.optimizer.step
        self.layers = factored_layers(self.model)
        self.skipped = 0

    def _optimizer(self) -> Any:
        parameters, lr = self.model.parameters(), LEARNING_RATE
        if not self.setting.optimizer:
            return torch.optim.AdamW(parameters, lr=lr, fused=self.setting.fused)
        module, _, name = self.setting.optimizer.rpartition(".")
        return getattr(importlib.import_module(module), name)(parameters, lr=lr, weight_decay=0.01)

    def run(self, after: Callable[[Training], None] = lambda training: None) -> dict[str, Any]:
        """All steps, `after` each; the worst that they left."""
        worst: list[tuple[float, float]] = []
        torch.set_float32_matmul_precision(self.setting.matmul)
        for number in range(self.options.steps):
            torch.manual_seed(1 + number)
            batch = batch_for(self.model, BATCH_SIZE, TOKENS, self.device)
            batch["labels"] = torch.arange(BATCH_SIZE, device=self.device) % 2
            self.train_on(batch)
            if self.handle.step_count:
                worst.append(worst_errors(self.layers))
            after(self)
        torch.set_float32_matmul_precision("highest")
        error, kappa = map(max, zip(*worst, strict=True))
        return {"skipped": self.skipped, "kappa_over_bound": kappa, "orthonormality_error": error}

    def train_on(self, batch: dict[str, Tensor]) -> None:
        """One step."""
        kind = self.setting.autocast
        with torch.autocast(self.device.type, kind) if kind else nullcontext():
            loss = self.forward(**batch).loss
        self.optimizer.zero_grad()
        if self.scaler is None:
            loss.backward()
            self.step()
            return
        before = self.handle.step_count
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped += self.handle.step_count == before

    def matrices(self) -> Tensor:
        """Every W, flattened."""
        return torch.cat([layer.matrix().detach().flatten().float() for layer in self.layers.values()])


class Rounded:
    """What bfloat16 parameters would hold, were each step exact and its result rounded."""

    def __init__(self, training: Training) -> None:
        self.worst: list[tuple[float, float]] = []
        self.kept: list[float] = []
        self.old = self._bases(training)

    @staticmethod
    def _bases(training: Training) -> Tensor:
        return torch.cat([basis.detach().flatten() for x in training.layers.values() for basis in (x.U, x.V)])

    def __call__(self, training: Training) -> None:
        self.worst.append(worst_errors(training.layers, lambda X: X.bfloat16()))
        old, new = self.old, self._bases(training)
        # The exact update of a parameter that is a bfloat16 number.
        self.kept.append(((old.bfloat16() + (new - old)).bfloat16() == old.bfloat16()).double().mean().item())
        self.old = new

    def result(self) -> dict[str, float]:
        """The worst of all steps, and the mean share of entries that a step leaves as they are."""
        error, kappa = map(max, zip(*self.worst, strict=True))
        kept = statistics.mean(self.kept)
        return {"skipped": 0, "kappa_over_bound": kappa, "orthonormality_error": error, "entries_kept": kept}


def measure(options: Options) -> dict[str, dict[str, Any]]:
    """Every setting whose packages are installed, and what bfloat16 parameters would hold."""
    device = any_device()
    plain = Training(SETTINGS["float32"], options, device)
    rounded = Rounded(plain)
    results = {"float32": plain.run(rounded)}
    reference = plain.matrices()
    for name in options.settings:
        setting = SETTINGS[name]
        package = setting.optimizer.partition(".")[0]
        if name == "float32" or (package and importlib.util.find_spec(package) is None):
            continue
        training = Training(setting, options, device)
        results[name] = training.run()
        results[name]["distance"] = ((training.matrices() - reference).norm() / reference.norm()).item()
    return results | {ROUNDED: rounded.result()}


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each setting."""
    lines = []
    for name, row in results.items():
        distance = "" if row.get("distance") is None else f"{row['distance']:.1e}"
        excess = f"{row['kappa_over_bound'] - 1:.1e}"
        lines.append([name, row["skipped"], excess, f"{row['orthonormality_error']:.1e}", distance])
    header = ["setting", "skipped", "largest κ / bound − 1", "‖UᵀU − I‖_F / √r", "distance from float32"]
    kept = f"in bfloat16 a step leaves {100 * results[ROUNDED]['entries_kept']:.0f} % of U and V unchanged"
    return f"{markdown_table(header, lines)}\n\n{kept}"


if __name__ == "__main__":
    run(Options, measure, table)
