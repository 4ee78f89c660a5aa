"""Adversarial training in the Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_condlr.adversarial import AdversarialTraining
from hf_condlr.attacks.base import logits_of
from hf_condlr.trainer.loss import TrainingLossMixin


class AdversarialTrainerMixin(TrainingLossMixin):
    """Trains on adversarial samples where `adversarial_attack` of the arguments is not none, see `AdversarialTraining`.

    To be put before a Trainer class, and before mixins whose loss should see the same samples. Random starts depend on
    the arguments' seed, the optimizer step, the part of its accumulated batch, and the process: a training that was
    resumed draws what an uninterrupted one would have drawn. Logs `adversarial_epsilon`, and as `adversarial_error`
    the share of the adversarial samples that the training misclassified.
    """

    processing_class: Any
    state: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adversary: AdversarialTraining | None = None
        if getattr(self.args, "adversarial_attack", "none") != "none":
            self.adversary = AdversarialTraining(self.args, processor=self.processing_class, seed=self.args.seed)
        self._part = 0  # of the accumulated batch
        self._errors = torch.zeros(2, dtype=torch.long, device=self.args.device)

    def training_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Any]:
        """The loss of adversarial inputs; with TRADES the clean one + β KL(p(x) ‖ p(x'))."""
        if self.adversary is None:
            return super().training_loss(model, inputs, num_items_in_batch)
        draw = (self.state.global_step, self._part, self.accelerator.process_index)
        self._part = 0 if self.accelerator.sync_gradients else self._part + 1
        labels = inputs.get("labels")  # Trainer may take them out
        with self.adversary.batch(model, inputs, progress=self._progress(), draw=draw) as batch:
            loss, outputs = super().training_loss(model, batch.inputs, num_items_in_batch)
        logits = logits_of(outputs)
        loss = loss + batch.regularizer(logits) * self.share_of_accumulated(labels, num_items_in_batch)
        self._errors += batch.errors(logits)
        return loss, outputs

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the radius of the last step and the error on the adversarial samples since the last log of the loss."""
        if self.adversary is not None and "loss" in logs:
            wrong, count = self.accelerator.reduce(self._errors, "sum").tolist()
            logs["adversarial_epsilon"] = self.adversary.epsilon(self._progress(-1))
            if count:
                logs["adversarial_error"] = wrong / count
            self._errors.zero_()
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _progress(self, offset: int = 0) -> float:
        """Share of the training that is done."""
        return (self.state.global_step + offset) / self.state.max_steps if self.state.max_steps > 0 else 1.0
