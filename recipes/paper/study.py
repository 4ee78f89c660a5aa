"""What a table needs, made once: trainings, the choice of each method's learning rate, and tests of what was chosen."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from experiments import EXPERIMENTS
from images import Split, hold_out, load
from methods import Method, build_model, prune
from resuming import load_weights, remove_checkpoints, save_weights, write_text
from torch import nn
from torch.utils.data import TensorDataset
from training import Job, TrainingOptions, accuracy, measure, train

from hf_condlr import RobustnessReport, evaluate_robustness
from hf_condlr.robustness.attacks import PixelModel

logger = logging.getLogger("paper")


@dataclass(frozen=True)
class Entry:
    """A line of the table: a method, at a rank where it has one."""

    method: str
    rank_ratio: float | None

    @property
    def label(self) -> str:
        """As it is printed."""
        return Method.parse(self.method).label


class Study:
    """Makes what is missing, and keeps it in `folder`: a folder for each row.

    Args:
        name: Of the experiment.
        training: What all rows have in common.
        folder: Where rows are kept.
        data_dir: Folder that holds the images' folder; or
        dataset_name: their name on the Hub.
        attacked_images: So many test images, drawn once, are attacked.
        check_samples: So many of them for the checks of the evaluation, for the first seed.
    """

    def __init__(
        self,
        name: str,
        training: TrainingOptions,
        folder: Path,
        *,
        data_dir: str | None = None,
        dataset_name: str | None = None,
        attacked_images: int | None = None,
        check_samples: int = 64,
        device: torch.device | None = None,
    ) -> None:
        self.name, self.experiment, self.training, self.folder = name, EXPERIMENTS[name], training, folder
        self.source = {"data_dir": data_dir, "dataset_name": dataset_name}
        self.attacked_images, self.check_samples = attacked_images, check_samples
        self.device = device or torch.device("cpu")
        self._data: dict[str, Split] | None = None

    @property
    def data(self) -> dict[str, Split]:
        """Read when first needed: a call that only prints needs no images."""
        if self._data is None:
            splits = load(self.experiment.dataset, **self.source)
            total = min(len(splits["train"].labels), self.training.subset or len(splits["train"].labels))
            held_out = round(self.training.validation_fraction * total)
            splits["train"], splits["validation"] = hold_out(splits["train"], held_out, total)
            self._data = {name: split.to(self.device) for name, split in splits.items()}
        return self._data

    # ------------------------------------------------------------------------------------------------- training

    def row_folder(self, job: Job) -> Path:
        """Its name holds what tells rows apart for the eye, and a digest of every setting."""
        key = {"experiment": self.name, **asdict(job), **asdict(self.training)}
        return self.folder / "rows" / f"{job}-{digest(key)}".replace(" ", "-").replace(":", "-")

    def train(self, job: Job) -> dict[str, Any]:
        """The row of one training, and the weights beside it; what was begun is gone on with."""
        folder = self.row_folder(job)
        if not (folder / "row.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            if job.method == "svd_prune":
                dense = replace(job, method="dense", rank_ratio=None)
                result = {name: self.train(dense)[name] for name in ("training_loss", "diverged", "training_seconds")}
                model = prune(self.model(dense), self.experiment, job.rank_ratio) if not result["diverged"] else None
                result |= measure(model, self.experiment, self.data["validation"]) if model else {}
            else:
                model, result = train(job, self.experiment, self.training, self.data, folder, self.device)
            if model is not None:
                save_weights(folder / "model.safetensors", model)
            write_json(folder / "row.json", {**asdict(job), **result})
            remove_checkpoints(folder)
            logger.info("%s: validation %.4f", job, result.get("validation_accuracy", 0.0))
        return json.loads((folder / "row.json").read_text())

    def model(self, job: Job) -> nn.Module:
        """The trained model, in evaluation mode."""
        model = build_model(Method.parse(job.method), self.experiment, job.seed, job.rank_ratio)
        if job.method == "svd_prune":
            model = prune(model, self.experiment, job.rank_ratio)
        load_weights(self.row_folder(job) / "model.safetensors", model)
        return model.to(self.device).eval()

    def choose(self, entry: Entry, rates: Sequence[float], seed: int) -> float | None:
        """The rate of the best validation accuracy, the smaller one of two equal ones; None where all diverged."""
        rows = [self.train(Job(**asdict(entry), learning_rate=rate, seed=seed)) for rate in sorted(rates)]
        rows = [row for row in rows if not row["diverged"]]
        return max(rows, key=lambda row: row["validation_accuracy"])["learning_rate"] if rows else None

    # ----------------------------------------------------------------------------------------------------- test

    def test(self, job: Job, checks: bool = False) -> dict[str, Any]:
        """Its row with the clean accuracy on the test split, and accuracy under each attack."""
        row = self.train(job)
        if row["diverged"]:
            return row
        settings = [attack.settings() for attack in self.experiment.attacks]
        folder = self.row_folder(job) / f"test-{digest([settings, self.attacked_images])}"
        if not (folder / "test.json").exists():
            model = PixelModel(self.model(job), mean=self.experiment.mean, std=self.experiment.std).to(self.device)
            report = self.attack(model, job, folder, checks)
            failed = [str(check) for check in report.failed_checks]
            test = {"clean_accuracy": accuracy(model, self.data["test"]), "failed_checks": failed}
            write_json(folder / "test.json", test)
            logger.info("%s\n%s", job, report)
        report = RobustnessReport.load(folder / "report.json")
        robust = {f"{attack.name} {attack.epsilon:g}": attack.robust_accuracy for attack in report.attacks}
        clean = {"clean_on_attacked": report.clean_accuracy, "report": str(folder)}
        robust |= {f"worst {case.threat} {case.epsilon:g}": case.robust_accuracy for case in report.worst_cases}
        return row | json.loads((folder / "test.json").read_text()) | clean | {"robust_accuracy": robust}

    def attack(self, model: nn.Module, job: Job, folder: Path, checks: bool) -> RobustnessReport:
        """All attacks of the experiment on the same test images for every row."""
        split = self.data["test"].to(torch.device("cpu"))
        return evaluate_robustness(
            model,
            TensorDataset(*split.batch(torch.arange(len(split.labels)))),
            list(self.experiment.attacks),
            name=Method.parse(job.method).label,
            batch_size=250,
            max_samples=self.attacked_images,
            checks=checks and self.check_samples > 0,
            check_samples=max(self.check_samples, 1),
            output_dir=folder,
            progress=False,
        )


def digest(settings: Any) -> str:
    """Of settings, for a folder's name."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Strict JSON, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")
