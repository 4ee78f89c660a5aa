"""Adversarial training: batches, or a share of each, are replaced by adversarial samples made for the current model.

    min_θ E max_{‖δ‖ ≤ ε(t)} CE(f_θ(x + δ), y)                        Madry et al. 2018; FGSM: Goodfellow et al. 2015
    min_θ E [CE(f_θ(x), y) + β max_{‖δ‖ ≤ ε(t)} KL(p_θ(x) ‖ p_θ(x + δ))]           TRADES, Zhang et al. 2019

For images δ is added to pixels of [0, 1], for texts to the embeddings of their tokens (Miyato et al. 2017).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from hf_condlr.robustness.attacks.base import attacked, logits_of, require, take
from hf_condlr.training.arguments import AdversarialArguments
from hf_condlr.training.loss import TrainingLossMixin, kl_divergence
from hf_condlr.training.perturbed_inputs import PerturbedInputs, class_labels, perturbed_inputs, twice


@dataclass(frozen=True)
class AdversarialBatch:
    """What the model is trained on instead of a batch."""

    inputs: dict[str, Any]
    """For `model(**inputs)`. With TRADES the batch and behind it, labelled −100, the same samples perturbed."""
    epsilon: float
    rows: Tensor
    """Numbers of the perturbed samples in `inputs` (k,)."""
    labels: Tensor
    """Their classes (k,)."""
    trades_beta: float = 0.0

    def regularizer(self, logits: Tensor) -> Tensor:  # (B, classes) -> ()
        """β KL(p(x) ‖ p(x')), mean over the samples: to be added to the loss of `inputs`; 0 without TRADES."""
        if not self.trades_beta or not len(self.rows):
            return logits.new_zeros(())
        clean, adversarial = logits.chunk(2)
        return self.trades_beta * kl_divergence(adversarial, clean).mean()

    def errors(self, logits: Tensor) -> Tensor:  # (B, classes) -> (2,)
        """How many of the perturbed samples are misclassified, and how many there are."""
        wrong = logits.detach()[self.rows].argmax(-1) != self.labels
        return torch.stack([wrong.sum(), torch.full_like(wrong.sum(), len(self.rows))])


class AdversarialTraining:
    """Crafts the adversarial samples of a training.

    The attack runs in evaluation mode and float32 on the model inside DDP, torch.compile and accelerate's autocast,
    and leaves parameters, gradients, training flags and random states as they were. In the models that normalise over
    a batch, TRADES normalises over clean and perturbed samples together.

    Args:
        arguments: The attack, its budget and schedule; a `CondLRTrainingArguments` has them too.
        processor: For images the model's image processor, which says how pixels were normalised; for texts its
            tokenizer, which names the special tokens that are not perturbed.
        seed: Of random starts, and of which samples a share takes.

    Example:
        >>> arguments = AdversarialArguments(adversarial_attack="pgd", adversarial_epsilon="8/255")
        >>> adversary = AdversarialTraining(arguments, processor=processor)
        >>> for step, inputs in enumerate(loader):
        ...     with adversary.batch(model, inputs, progress=step / steps, draw=step) as batch:
        ...         outputs = model(**batch.inputs)
        ...     loss = outputs.loss + batch.regularizer(outputs.logits)
    """

    def __init__(self, arguments: AdversarialArguments, *, processor: Any = None, seed: int = 0) -> None:
        require(
            arguments.adversarial_attack != "none",
            "adversarial training needs an attack",
            "adversarial_attack='none'",
            "Set adversarial_attack to fgsm or pgd, and adversarial_epsilon.",
        )
        self.arguments, self.processor, self.seed = arguments, processor, seed
        self._checked = False

    def epsilon(self, progress: float) -> float:
        """ε(t) at a share t of the training: ε clip(2t − ½, 0, 1) on the ramp, which saves pretrained models."""
        ramp = 1.0 if self.arguments.adversarial_schedule == "constant" else min(max(2 * progress - 0.5, 0.0), 1.0)
        return ramp * float(self.arguments.adversarial_epsilon)  # type: ignore[arg-type]

    @contextmanager
    def batch(
        self, model: nn.Module, inputs: Mapping[str, Any], *, progress: float = 1.0, draw: int | Sequence[int] = 0
    ) -> Iterator[AdversarialBatch]:
        """The batch that takes the place of `inputs`; the model's forward pass belongs inside the `with` block.

        Args:
            model: Wrapped or not.
            inputs: With `pixel_values` or `input_ids`, and `labels` (B,).
            progress: Share of the training that is done, for the schedule.
            draw: Numbers ≥ 0 that tell this batch from all others (step, process): equal ones draw alike.

        Raises:
            AttackError: No labels or not one class a sample, or a normalisation that is unknown or another.
        """
        require(
            not isinstance(model, nn.DataParallel),
            "adversarial training takes one process for each device",
            "a model in DataParallel",
            "Start it with torchrun or accelerate launch.",
        )
        labels = class_labels(inputs)
        bare = extract_model_from_parallel(model, keep_torch_compile=False)
        kind = perturbed_inputs(bare, inputs, self.arguments, self.processor)
        epsilon = self.epsilon(progress)
        generator, seed = self._draws(draw)
        rows = self._rows(len(labels), generator).to(labels.device) if epsilon else labels.new_empty(0)
        if len(rows) or not self._checked:  # what can be checked is checked at the start, not where the ramp rises
            clean = kind.clean(inputs)
            self._checked = True
        if not len(rows):
            yield AdversarialBatch(dict(inputs), epsilon, rows, labels[:0])
            return
        found = self._attack(kind, take(clean, rows), labels[rows], epsilon, seed)
        joined, beta, size = dict(inputs), self.arguments.trades_beta, len(labels)
        if beta:
            joined = twice(joined, size)
            joined["labels"][size:] = -100  # what is perturbed has no part in the loss
            rows = rows + size
        with kind.applied(joined, rows, found) as perturbed:
            yield AdversarialBatch(perturbed, epsilon, rows, labels[rows % size], beta)

    def _attack(self, kind: PerturbedInputs, clean: Any, labels: Tensor, epsilon: float, seed: int) -> Any:
        if self.arguments.trades_beta:
            with attacked(kind.model), torch.no_grad():
                labels = kind.model(clean).softmax(-1)
        return kind.attack(epsilon, seed)(kind.model, clean, labels)

    def _draws(self, draw: int | Sequence[int]) -> tuple[torch.Generator, int]:
        """A generator for the choice of samples, and a seed for the attack."""
        entropy = [self.seed, *([draw] if isinstance(draw, int) else draw)]
        first, second = np.random.SeedSequence(entropy).generate_state(2).tolist()
        return torch.Generator().manual_seed(first), second

    def _rows(self, size: int, generator: torch.Generator) -> Tensor:
        """A share of `size` samples; the rest of a sample that it comes to is one more as often as that says."""
        count = int(self.arguments.adversarial_share * size + torch.rand((), generator=generator).item())
        return torch.randperm(size, generator=generator)[:count].sort().values


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
