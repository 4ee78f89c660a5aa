"""The rows of the study: a compressed model, perhaps trained again, and its test."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from hf_condlr import evaluate_robustness
from hf_condlr.robustness.attacks import PGD, Attack, Corruption, EmbeddingPGD, EmbeddingSearch, Square
from studies.paper.methods import condition_numbers
from studies.pretrained.latency import milliseconds
from studies.pretrained.methods import METHODS, calibration, compressed
from studies.pretrained.tasks import Task
from studies.pretrained.training import fitted, hits
from studies.record import logger
from studies.rows import Rows

BUDGETS = {"imagenette": (0.5 / 255, 1 / 255), "sst2": (0.02, 0.05)}
CORRUPTIONS = ("gaussian_noise", "gaussian_blur", "contrast", "jpeg")  # of severity 3
VALIDATED_UNDER_ATTACK = 200  # rows of the validation split
ATTACKED_TRAINING = {  # arguments of the Trainer; TRADES compares each sample with its attacked one
    "fgsm": {"adversarial_attack": "fgsm", "adversarial_share": 0.5},
    "pgd": {"adversarial_attack": "pgd", "adversarial_share": 0.5, "adversarial_steps": 3},
    "trades": {"adversarial_attack": "pgd", "adversarial_steps": 3, "trades_beta": 6.0},
}
DISTILLATION = 0.9  # weight of the dense model's outputs; 0.1 is that of the labels


@dataclass(frozen=True)
class Variant:
    """A method, how much it removes, and whether a training follows."""

    method: str
    ratio: float
    steps: int = 0
    adversarial: float = 0.0
    """ε of the adversarial samples of that training; 0: none."""
    attack: str = "fgsm"
    """How they are found, a key of `ATTACKED_TRAINING`."""

    @property
    def label(self) -> str:
        """In tables."""
        further = ", trained further" if self.method == "dense" and self.steps else ""
        how = ", adversarially" if self.attack == "fgsm" else f", by {self.attack.upper()}"
        return METHODS[self.method].label + further + (how if self.adversarial else "")


@dataclass(frozen=True)
class Samples:
    """How many rows calibrate, test, and are attacked; drawn once, the same for every model."""

    calibration: int = 256
    clean: int = 500
    attacked: int = 100
    attack_steps: int = 5
    epsilons: tuple[float, ...] = ()
    """Budgets of the attacks; by default two for each task, `BUDGETS`."""
    queries: int = 0
    """Of an attack without gradients, in addition to PGD; 0: none."""


class Experiment:
    """Finished rows of a fine-tuned model, and what makes the missing ones.

    Args:
        task: Its data.
        dense_path: Folder of the fine-tuned model.
        root: Folder of the rows.
        samples: Numbers of rows.
        bf16: Recover in bfloat16.
    """

    def __init__(self, task: Task, dense_path: str, root: Path, samples: Samples, *, bf16: bool = True) -> None:
        self.task, self.dense_path, self.samples, self.bf16 = task, dense_path, samples, bf16
        self.rows = Rows(root)

    @functools.cached_property
    def dense(self) -> Any:
        """The fine-tuned model."""
        return self.task.model(self.dense_path).eval()

    @functools.cached_property
    def _measured(self) -> Any:
        return calibration(self.task, self.samples.calibration)

    @functools.cached_property
    def _measured_under_attack(self) -> Any:
        return calibration(self.task, self.samples.calibration, self.dense, self._pgd(max(self.epsilons)))

    @property
    def epsilons(self) -> tuple[float, ...]:
        """Budgets of the attacks."""
        return self.samples.epsilons or BUDGETS[self.task.name]

    def start(self, variant: Variant) -> dict[str, Any]:
        """The row of a compressed model before any training; the model lies in its folder."""
        method = METHODS[variant.method]
        key = {**asdict(method), "tau": str(method.tau), "cap": str(method.cap)}
        key["calibration"] = self.samples.calibration
        if method.attacked:
            key["epsilon"] = max(self.epsilons)
        if method.start != "dense":
            key["ratio"] = variant.ratio

        def make(folder: Path) -> dict[str, Any]:
            set_seed(0)
            begin = time.process_time()
            measured = self._measured_under_attack if method.attacked else self._measured
            model = compressed(self.task, self.dense, method, variant.ratio, measured, self.samples.calibration)
            seconds = round(time.process_time() - begin, 1)  # less where another method has measured the same moments
            return {"conversion_seconds": seconds, **self._saved(model, folder)}

        return self.rows.row(f"{self.task.name} {variant.method} {variant.ratio:g}", key, make)

    def train(self, variant: Variant, rate: float, seed: int) -> dict[str, Any]:
        """The row of a model after its recovery, if it has one."""
        facts = {"label": variant.label, **asdict(variant), "learning_rate": rate, "seed": seed}
        start = self.start(variant)
        if not variant.steps:
            return {**start, **facts, "diverged": False, "validation_accuracy": None}

        def make(folder: Path) -> dict[str, Any]:
            method = METHODS[variant.method]
            model = self.task.model(start["folder"])
            options = {"conditioning_warmup_ratio": 0.0, "distillation_weight": DISTILLATION, "teacher": self.dense}
            options |= {"free": method.free, "bf16": self.bf16}
            if variant.adversarial:
                options |= ATTACKED_TRAINING[variant.attack]
                options |= {"adversarial_epsilon": variant.adversarial, "adversarial_schedule": "constant"}
            result = fitted(self.task, model, folder, rate=rate, steps=variant.steps, seed=seed, **options)
            if variant.adversarial:  # the mean of clean and robust accuracy chooses the rate
                result["validation_clean"] = result["validation_accuracy"]
                result["validation_robust"] = self._validated_under_attack(model, variant.adversarial)
                result["validation_accuracy"] = (result["validation_clean"] + result["validation_robust"]) / 2
            return {**result, **self._saved(model, folder)}

        key = {"start": start["key"], "steps": variant.steps, "rate": rate, "seed": seed, "bf16": self.bf16}
        key |= {"adversarial": variant.adversarial} if variant.adversarial else {}
        key |= {"attack": variant.attack} if variant.attack != "fgsm" else {}
        name = f"{self.task.name} {variant.method} {variant.ratio:g} steps {variant.steps} lr {rate:g} seed {seed}"
        row = self.rows.row(name, key, make)
        return {**row, **facts, "diverged": not math.isfinite(row["training_loss"])}

    def test(self, variant: Variant, rate: float, seed: int, *, checks: bool = False) -> dict[str, Any]:
        """What the test adds to that row: clean samples, attacks, corruptions."""
        folder = Path(self.train(variant, rate, seed)["folder"])
        chosen, attacks = self.samples, self.attacks()

        def make(place: Path) -> dict[str, Any]:
            model = self.task.model(folder).eval()
            rows = self.task.test
            if chosen.clean < len(rows):
                rows = rows.shuffle(seed=0).select(range(chosen.clean))
            right = hits(self.task, model, rows)
            report = evaluate_robustness(
                model,
                self.task.attackable(self.task.test),
                attacks,
                processor=self.task.processor,
                name=variant.label,
                max_samples=chosen.attacked,
                output_dir=place,
                progress=False,
                checks="quick" if checks else False,
                check_samples=64,
            )
            logger.info("%s", report)
            robust = {
                f"{a.threat} {a.epsilon:g}": a.survived for a in report.worst_cases if a.threat[:10] != "corruption"
            }
            robust |= {a.name: a.survived for a in report.attacks if a.threat.startswith("corruption")}
            return {
                "clean_accuracy": sum(right) / len(right),
                "right": as_text(right),
                "survived": {name: as_text(flags) for name, flags in robust.items()},
                "failed_checks": [str(check) for check in report.failed_checks],
            }

        key = {"attacks": [attack.settings() for attack in attacks], "samples": chosen.attacked, "clean": chosen.clean}
        return Rows(folder).row("test", key | ({"checks": True} if checks else {}), make)

    def latency(self, variants: Sequence[Variant]) -> dict[str, float]:
        """Milliseconds of processor time for one test sample: the dense model's, and those of the variants' starts."""
        folders = {"dense": self.dense_path} | {name(v): self.start(v)["folder"] for v in variants}

        def make(folder: Path) -> dict[str, Any]:
            batch = self.task.collate([self.task.test[0]])
            del batch["labels"]
            models = {each: self.task.model(path) for each, path in folders.items()}
            return {"milliseconds": milliseconds(models, batch)}

        key = {"models": {each: Path(path).name for each, path in folders.items()}, "threads": torch.get_num_threads()}
        return self.rows.row("latency", key, make)["milliseconds"]

    def attacks(self) -> list[Attack]:
        """PGD and perhaps a search at each budget; images: PGD also against the margin, and corruptions."""
        found: list[Attack] = []
        for epsilon in self.epsilons:
            found.append(self._pgd(epsilon))
            if self.task.name == "imagenette":  # equal to the cross entropy for two classes
                found.append(replace(self._pgd(epsilon), loss="margin"))
            if self.samples.queries:
                search = Square if self.task.name == "imagenette" else EmbeddingSearch
                found.append(search(epsilon, queries=self.samples.queries))
        return found + [Corruption(kind, 3) for kind in CORRUPTIONS if self.task.name == "imagenette"]

    def _pgd(self, epsilon: float) -> Any:
        return (PGD if self.task.name == "imagenette" else EmbeddingPGD)(epsilon, steps=self.samples.attack_steps)

    def _validated_under_attack(self, model: Any, epsilon: float) -> float:
        report = evaluate_robustness(
            model.eval(),
            self.task.attackable(self.task.validation),
            self._pgd(epsilon),
            processor=self.task.processor,
            max_samples=VALIDATED_UNDER_ATTACK,
            progress=False,
            checks=False,
        )
        return report.attacks[0].robust_accuracy

    def _saved(self, model: Any, folder: Path) -> dict[str, Any]:
        model.save_pretrained(folder)
        self.task.processor.save_pretrained(folder)
        kappa = {name: value for name, value in condition_numbers(model).items() if ".encoder.layer." in name}
        return {"condition_numbers": kappa, "parameters": folded_parameters(model)}


def name(variant: Variant) -> str:
    """Of a start, in the table of latencies."""
    return f"{variant.method} {variant.ratio:g}"


def folded_parameters(model: Any) -> int:
    """Parameters of the model with S multiplied into U, as it is used."""
    cores = [parameter.numel() for name, parameter in model.named_parameters() if name.endswith(".S")]
    return sum(parameter.numel() for parameter in model.parameters()) - sum(cores)


def as_text(flags: Sequence[bool]) -> str:
    """A digit for each sample."""
    return "".join("01"[bool(flag)] for flag in flags)
