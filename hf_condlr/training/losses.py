"""The training loss with the terms of a teacher and of an adversary, for any loss that the Trainer computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_condlr.errors import ConfigError, require
from hf_condlr.robustness.attacks.base import logits_of
from hf_condlr.training.accumulation import follows_item_count
from hf_condlr.training.adversarial import AdversarialTraining
from hf_condlr.training.arguments import CondLRArguments
from hf_condlr.training.distillation import Distillation, is_causal_model, predicted_labels


class CombinedLoss:
    """A Trainer's `compute_loss` that adds (1 − λ) loss + λ distillation, and trains on adversarial samples.

    It calls the Trainer's own `compute_loss`, so that one of a subclass, a `compute_loss_func` and label smoothing work
    with it. A batch in parts trains as one batch: a loss that ignores `num_items_in_batch` counts as the mean over the
    labels of its part. The loss of an evaluation stays plain.

    Random starts depend on the seed, the optimizer step, the part of its accumulated batch, and the process, so that a
    resumed training draws the same numbers as an uninterrupted one.

    Args:
        trainer: The Trainer, after its construction.
        arguments: Arguments of the Trainer, or the defaults.
        teacher: A dense model, if `distillation_weight` > 0.

    Raises:
        ConfigError: There is a teacher without a weight, or a weight without a teacher; or their classes differ.
    """

    def __init__(self, trainer: Any, arguments: CondLRArguments, teacher: nn.Module | None = None) -> None:
        self.trainer, self.weight = trainer, arguments.distillation_weight
        self.plain = trainer.compute_loss
        require(
            (teacher is not None) == (self.weight > 0),
            "a teacher and distillation_weight > 0 belong together",
            received=f"{'no teacher' if teacher is None else 'a teacher'}, distillation_weight={self.weight}",
            remedy="Give CondLRTrainer a teacher and CondLRTrainingArguments(distillation_weight=0.5), or neither.",
            error=ConfigError,
        )
        student = trainer.accelerator.unwrap_model(trainer.model)
        self.is_causal = is_causal_model(student)
        self.distillation: Distillation | None = None
        if teacher is not None:
            teacher, temperature = teacher.to(trainer.args.device), arguments.distillation_temperature
            self.distillation = Distillation(teacher, student, temperature, trainer.label_names or ())
        self.adversary: AdversarialTraining | None = None
        if arguments.adversarial_attack != "none":
            processor, seed = trainer.processing_class, trainer.args.seed
            self.adversary = AdversarialTraining(arguments, processor=processor, seed=seed)
        self.follows_item_count: bool | None = None  # not measured yet
        self._part = 0  # of the accumulated batch
        self._errors = torch.zeros(2, dtype=torch.long, device=trainer.args.device)

    def __call__(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss, and the outputs of the model if they are asked for."""
        if not model.training:
            return self.plain(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        if num_items_in_batch is not None:
            self._measure(model, inputs, num_items_in_batch)
        if self.adversary is None and self.distillation is None:
            return self._plain(model, inputs, return_outputs, num_items_in_batch)
        combined = self._distilled if self.adversary is None else self._adversarial
        loss, outputs = combined(model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _measure(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int) -> None:
        """Find out, once, whether the loss follows `num_items_in_batch`, if batches come in parts."""
        trainer = self.trainer
        parts = trainer.args.gradient_accumulation_steps * trainer.accelerator.num_processes
        is_stated = trainer.loss_is_scaled_for_ga is not None
        if self.follows_item_count is not None or parts == 1 or is_stated:
            return
        follows = follows_item_count(self.plain, model, inputs, num_items)
        found = torch.tensor([-1 if follows is None else int(follows)], device=trainer.args.device)
        best = trainer.accelerator.gather(found).max().item()
        self.follows_item_count = None if best < 0 else best > 0

    def _plain(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, num_items: Any) -> Any:
        """The loss of the Trainer, as its share of the accumulated batch."""
        if self.follows_item_count is not False or num_items is None:
            return self.plain(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items)
        labels = inputs.get("labels")  # before Trainer takes them out
        found = self.plain(model, inputs, return_outputs=return_outputs, num_items_in_batch=None)
        share = self._share(labels, num_items)
        return (found[0] * share, found[1]) if return_outputs else found * share

    def _distilled(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Any, clean: dict[str, Any] | None = None
    ) -> tuple[Tensor, Any]:
        """The loss on `inputs`; the teacher sees `clean`, if they are other ones."""
        loss, outputs = self._plain(model, dict(inputs), True, num_items)
        if self.distillation is None:
            return loss, outputs
        term = self.distillation(outputs, clean or inputs) * self._share(inputs.get("labels"), num_items)
        if self.weight == 1:  # a loss that is not finite has no part in the sum
            return term, outputs
        return (1 - self.weight) * loss + self.weight * term, outputs

    def _adversarial(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> tuple[Tensor, Any]:
        assert self.adversary is not None
        accelerator = self.trainer.accelerator
        draw = (self.trainer.state.global_step, self._part, accelerator.process_index)
        self._part = 0 if accelerator.sync_gradients else self._part + 1
        with self.adversary.batch(model, inputs, progress=self._progress(), draw=draw) as batch:
            # A teacher that is no robuster than the student would teach it the errors that the attack provokes.
            loss, outputs = self._distilled(model, batch.inputs, num_items, clean=inputs)
            logits = logits_of(outputs)
            loss = loss + batch.regularizer(logits) * self._share(inputs.get("labels"), num_items)
        self._errors += batch.errors(logits)
        return loss, outputs

    def _share(self, labels: Tensor | None, num_items: Tensor | int | None) -> Tensor | float:
        """Weight of a mean over the labels of this batch in the mean over the accumulated one.

        1 where Trainer counts no items: it divides the loss by the number of parts.
        """
        if num_items is None or labels is None:
            return 1.0
        share = (predicted_labels(labels, self.is_causal) != -100).sum() / num_items
        is_sum = self.trainer.args.average_tokens_across_devices
        return share * self.trainer.accelerator.num_processes if is_sum else share

    def _progress(self, offset: int = 0) -> float:
        state = self.trainer.state
        return (state.global_step + offset) / state.max_steps if state.max_steps > 0 else 1.0

    def records(self) -> dict[str, float]:
        """For the log of the loss: ε of the last step, and the share of adversarial samples that were misclassified.

        All processes must call it; the count starts again at 0.
        """
        if self.adversary is None:
            return {}
        wrong, count = self.trainer.accelerator.reduce(self._errors, "sum").tolist()
        self._errors.zero_()
        records = {"adversarial_epsilon": self.adversary.epsilon(self._progress(-1))}
        return records | ({"adversarial_error": wrong / count} if count else {})
