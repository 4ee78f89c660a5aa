"""Recovery: some steps of distillation from the dense model, κ bounded in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import SchedulerType

from hf_condlr.checkpoints.restore import last_complete_checkpoint
from hf_condlr.compression.arguments import CompressionArguments
from hf_condlr.compression.task import Task
from hf_condlr.errors import CheckpointError
from hf_condlr.training import CondLRTrainer, CondLRTrainingArguments

DISTILLATION = 0.9  # weight of the teacher's outputs; the rest is the loss of the labels
LEARNING_RATE = 1e-5  # 3e-5 and 1e-4 spoiled the sequential start of a ViT in 120 and 250 steps
SAVINGS = 10  # checkpoints in a recovery


def recover(
    model: PreTrainedModel, teacher: nn.Module, task: Task, train: Dataset, args: CompressionArguments, folder: Path
) -> None:
    """Train the compressed model for `recovery_steps`, in place; checkpoints in `folder` let a killed one resume.

    The factors begin within the bound, so there is no warm-up of it. The last model is taken, not the best: nothing is
    chosen by these rows' quality.
    """
    steps = args.recovery_steps
    adversarial: dict[str, Any] = {}
    if args.adversarial_epsilon is not None:
        adversarial = {"adversarial_attack": "fgsm", "adversarial_epsilon": args.adversarial_epsilon}
        adversarial |= {"adversarial_share": 0.5, "adversarial_schedule": "constant"}
    training = CondLRTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=args.learning_rate or LEARNING_RATE,
        lr_scheduler_type=SchedulerType.COSINE,
        warmup_steps=steps // 10,
        per_device_train_batch_size=task.batch_size,
        conditioning_warmup_ratio=0.0,
        distillation_weight=DISTILLATION,
        seed=args.seed,
        save_steps=max(1, steps // SAVINGS),
        save_total_limit=1,
        logging_steps=max(1, steps // SAVINGS),
        report_to="none",
        remove_unused_columns=False,  # the transforms read the other columns
        dataloader_pin_memory=torch.accelerator.is_available(),
        **adversarial,
    )
    trainer = CondLRTrainer(
        model=model,
        args=training,
        train_dataset=task.inputs(train, steps * task.batch_size, shuffle=True),
        processing_class=task.processor,
        data_collator=task.collator,
        teacher=teacher,
    )
    try:
        checkpoint = last_complete_checkpoint(str(folder))
    except CheckpointError:
        checkpoint = None
    trainer.train(resume_from_checkpoint=checkpoint)
