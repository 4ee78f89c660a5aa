"""Recovery of a compressed language model: self-distillation from the dense one, κ bounded at every step."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from transformers.trainer_utils import SchedulerType

from hf_condlr import CondLRTrainer, CondLRTrainingArguments
from hf_condlr.layers import factored_layers


def recover(
    model: PreTrainedModel, teacher: PreTrainedModel, blocks: Tensor, *, rate: float, batch_size: int, bfloat16: bool
) -> dict[str, Any]:
    """Train the factors, and nothing else, for one pass over the blocks (N, tokens), in place; the losses as logged.

    The loss is KL(dense ‖ compressed) of every token's prediction, without the text's own labels: the model learns back
    what it was, not the text. AdamW without decay, cosine schedule.
    """
    model.requires_grad_(False)
    for layer in factored_layers(model).values():
        layer.requires_grad_(True)
    steps = len(blocks) // batch_size
    with tempfile.TemporaryDirectory() as folder:
        training = CondLRTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            learning_rate=rate,
            lr_scheduler_type=SchedulerType.COSINE,
            warmup_steps=steps // 10,
            per_device_train_batch_size=batch_size,
            conditioning_warmup_ratio=0.0,
            distillation_weight=1.0,
            distillation_temperature=1.0,
            bf16=bfloat16,
            use_cpu=not torch.accelerator.is_available(),
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.accelerator.is_available(),
        )
        ids = blocks.tolist()
        data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        trainer = CondLRTrainer(model=model, args=training, train_dataset=data, teacher=teacher)
        trainer.train()
    model.eval()
    return {"steps": steps, "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]}
