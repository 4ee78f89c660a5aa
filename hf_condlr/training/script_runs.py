"""What every training script does with its Trainer: train and save the model at once, then write what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from hf_condlr.layers import condition_report, factored_layers
from hf_condlr.robustness.evaluation import RobustnessReport

ON_CARD = ("accuracy", "loss", "perplexity")


def train_and_save(trainer: Trainer, checkpoint: str | None = None) -> None:
    """Train to the end, and save the model, its processor, the Trainer's state and the metrics of the training.

    Args:
        trainer: Before training.
        checkpoint: Folder to go on from, see `checkpoint_to_resume`.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if factored_layers(model):
        report = condition_report(model)
        sizes = f"{report.parameters:,} of {report.dense_parameters:,} parameters"
        trainer.accelerator.print(f"{len(report.layers)} layers are factored: {sizes}")
    # Read now: training may delete the checkpoint that it goes on from (save_total_limit).
    done = json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())["global_step"] if checkpoint else 0
    output = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.state.global_step > done:  # else all was trained before, and its metrics are there
        trainer.save_metrics("train", output.metrics | {"train_steps_before": done})
    trainer.save_state()


def write_results(
    trainer: Trainer,
    split: str,
    metrics: Mapping[str, float],
    *,
    report: RobustnessReport | None = None,
    dataset: str | None = None,
) -> None:
    """Write the metrics of a split, the report of the attacks and the model card, and push them if asked for.

    Args:
        trainer: After `train_and_save`.
        split: Name of the split that the model was evaluated and attacked on.
        metrics: Of that split, each under a name that begins with the split's.
        report: Of the attacks on that split.
        dataset: Name of the data set on the Hub.
    """
    trainer.log_metrics(split, dict(metrics))
    trainer.save_metrics(split, dict(metrics))
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
