"""Distillation in the Trainer: the student also learns the logits of a dense teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_condlr.errors import ConfigError
from hf_condlr.training.loss import TrainingLossMixin, kl_divergence


class DistillationMixin(TrainingLossMixin):
    """Adds the teacher's term to the training loss. To be put before a Trainer class.

    Args:
        teacher: A dense model whose logits the student also learns (`distillation_weight` > 0).
    """

    def __init__(self, *args: Any, teacher: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        weight = self.args.distillation_weight
        if (teacher is not None) != (weight > 0):
            raise ConfigError(
                "a teacher and distillation_weight > 0 belong together",
                received=f"{'no teacher' if teacher is None else 'a teacher'}, distillation_weight={weight}",
                remedy="CondLRTrainer(..., teacher=dense_model) with distillation_weight=0.5, say; or neither.",
            )
        self.teacher = teacher.to(self.args.device).eval() if teacher is not None else None

    def training_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Any]:
        """(1 − λ) loss + λ T² KL(softmax(z_teacher/T) ‖ softmax(z/T))."""
        if self.teacher is None:
            return super().training_loss(model, inputs, num_items_in_batch)
        labels, mask = inputs.get("labels"), inputs.get("attention_mask")
        teacher_inputs = {key: value for key, value in inputs.items() if key != "labels"}
        loss, outputs = super().training_loss(model, inputs, num_items_in_batch)
        with torch.no_grad():
            target = self.teacher(**teacher_inputs).logits
        logits = outputs["logits"]
        if labels is not None and labels.shape == target.shape[:-1]:
            if type(self.accelerator.unwrap_model(model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
                logits, target, labels = logits[:, :-1], target[:, :-1], labels[:, 1:]  # position t predicts t + 1
            mask = labels != -100
        term = distillation_loss(logits, target, self.args.distillation_temperature, mask)
        term = term * self.share_of_accumulated(labels, num_items_in_batch)
        return (1 - self.args.distillation_weight) * loss + self.args.distillation_weight * term, outputs


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:  # (*, classes), (*, classes), (*) -> ()
    """T² KL(softmax(z_t/T) ‖ softmax(z/T)), mean over samples or tokens that a mask of their shape leaves.

    Source: Hinton, Vinyals, Dean 2015, section 2.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)  # before the division
    divergence = kl_divergence(logits.to(wide) / temperature, teacher_logits.to(wide) / temperature)
    if mask is not None and mask.shape == divergence.shape:
        divergence = divergence[mask.bool()]
    return temperature**2 * divergence.mean()
