"""Steps of every training script with its Trainer: choose it, train and save the model at once, write results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from hf_condlr.layers import condition_report, factored_layers
from hf_condlr.robustness.evaluation import RobustnessReport
from hf_condlr.training import CondLRTrainer, FactoredTrainer

ON_CARD = ("accuracy", "loss", "perplexity")


class DenseTrainer(FactoredTrainer):
    """Trainer of dense models, on the same adversarial samples as the other methods."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any) -> None:
        """Load with `from_pretrained`: Trainer skips weights whose names on disk are not the model's own (ViT's)."""
        bare: Any = self.accelerator.unwrap_model(self.model)
        bare.load_state_dict(type(bare).from_pretrained(resume_from_checkpoint, dtype=bare.dtype).state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def trainer_class(method: str) -> type[Trainer]:
    """The Trainer of a method: `dense`, `lowrank` (U, S, V without a constraint) or `condlr` (κ(S) ≤ 1 + τ)."""
    trainers: dict[str, Any] = {"dense": DenseTrainer, "lowrank": FactoredTrainer, "condlr": CondLRTrainer}
    return trainers[method]


def train_and_save(trainer: Trainer, checkpoint: str | None = None) -> None:
    """Train to the end, and save the model, its processor, the Trainer's state and the metrics of the training.

    Args:
        trainer: Before training.
        checkpoint: Folder to resume from, see `checkpoint_to_resume`.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if factored_layers(model):
        report = condition_report(model)
        sizes = f"{report.parameters:,} of {report.dense_parameters:,} parameters"
        sizes += f", {report.folded_parameters:,} once folded"
        trainer.accelerator.print(f"{len(report.layers)} layers are factored: {sizes}")
    # Read now: training may delete the checkpoint that it resumes from (save_total_limit).
    done = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())["global_step"] if checkpoint else 0
    output = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.state.global_step > done:  # else all was trained before, and its metrics are there
        trainer.save_metrics("train", output.metrics | {"train_steps_before": done})
    trainer.save_state()


def write_results(
    trainer: Trainer,
    split: str,
    metrics: dict[str, float],
    *,
    report: RobustnessReport | None = None,
    dataset: str | None = None,
) -> None:
    """Write the metrics of a split, the report of the attacks and the model card, and push them if asked for.

    Args:
        trainer: After `train_and_save`.
        split: Name of the split that the model was evaluated and attacked on.
        metrics: Metrics of that split, each under a name that begins with the split's.
        report: Report of the attacks on that split.
        dataset: Name of the data set on the Hub.
    """
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    if report is not None and trainer.is_world_process_zero():
        trainer.accelerator.print(report)
        report.save(Path(str(trainer.args.output_dir)) / "robustness.json")
    card: dict[str, Any] = {
        "dataset": dataset,
        "split": split,
        "metrics": {name: metrics[f"{split}_{name}"] for name in ON_CARD if f"{split}_{name}" in metrics},
        "robustness": report.card_entries() if report is not None else [],
    }
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
