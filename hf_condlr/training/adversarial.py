"""Adversarial training: each batch, or a share of it, is replaced by adversarial samples for the current model.

    min_θ E max_{‖δ‖ ≤ ε(t)} CE(f_θ(x + δ), y)                        Madry et al. 2018; FGSM: Goodfellow et al. 2015
    min_θ E [CE(f_θ(x), y) + β max_{‖δ‖ ≤ ε(t)} KL(p_θ(x) ‖ p_θ(x + δ))]           TRADES, Zhang et al. 2019

For images δ is added to pixels of [0, 1], for texts to the embeddings of their tokens (Miyato et al. 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn

from hf_condlr.robustness.attacks.base import attacked, logits_of, require, take
from hf_condlr.training.arguments import AdversarialArguments
from hf_condlr.training.distillation import kl_divergence
from hf_condlr.training.perturbed_inputs import class_labels, perturbed_inputs


@dataclass
class AdversarialBatch:
    """Inputs and labels that the model is trained on instead of a batch."""

    inputs: dict[str, Any]
    """Inputs for `model(**inputs)`: the perturbed samples, or with TRADES the clean ones."""
    epsilon: float
    rows: Tensor
    """Numbers of the perturbed samples (k,)."""
    labels: Tensor
    """Their classes (k,)."""
    trades_beta: float = 0.0
    perturbed_logits: Callable[[], Tensor] | None = None
    """With TRADES, the model's forward pass of the perturbed samples, (B, classes)."""

    def regularizer(self, logits: Tensor) -> Tensor:  # (B, classes) -> ()
        """β KL(p(x) ‖ p(x')), mean over the samples, from the logits of the clean ones; 0 without TRADES."""
        if self.perturbed_logits is None:
            return logits.new_zeros(())
        adversarial = self.perturbed_logits()
        self._adversarial = adversarial.detach()
        return self.trades_beta * kl_divergence(adversarial, logits).mean()

    def errors(self, logits: Tensor) -> Tensor:  # (B, classes) -> (2,)
        """How many of the perturbed samples are misclassified, and how many there are; after `regularizer`."""
        logits = logits.detach() if self.perturbed_logits is None else self._adversarial
        wrong = logits[self.rows].argmax(-1) != self.labels
        return torch.stack([wrong.sum(), torch.full_like(wrong.sum(), len(self.rows))])


class AdversarialTraining:
    """Crafts the adversarial samples of a training.

    The attack runs in evaluation mode and float32 on the model inside DDP, torch.compile and accelerate's autocast,
    and leaves parameters, gradients, training flags and random states as they were.

    Args:
        arguments: The attack, its budget and schedule; a `CondLRTrainingArguments` has them too.
        processor: The image processor, for how pixels were normalised; or the tokenizer, whose special tokens are not
            perturbed.
        seed: Seed of the random starts, and of the choice of samples.

    Examples:
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
        """The batch that takes the place of `inputs`; forward passes and `regularizer` belong inside the `with` block.

        Args:
            model: Wrapped or not.
            inputs: With `pixel_values` or `input_ids`, and `labels` (B,).
            progress: Share of the training that is done, for the schedule.
            draw: Numbers ≥ 0 that identify this batch (step, process): equal ones draw the same random numbers.

        Raises:
            AttackError: There is not one class for each sample, or the normalisation of the images is unknown.
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
        if len(rows) or not self._checked:  # errors come at the start, not when the ramp rises
            clean = kind.clean(inputs)
            self._checked = True
        if not len(rows):
            yield AdversarialBatch(dict(inputs), epsilon, rows, labels[:0])
            return
        chosen, target, beta = take(clean, rows), labels[rows], self.arguments.trades_beta
        if beta:
            with attacked(kind.model), torch.no_grad():
                target = kind.model(chosen).softmax(-1)
        found = kind.attack(epsilon, seed)(kind.model, chosen, target)
        if beta:

            def perturbed_logits() -> Tensor:
                unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
                with kind.applied(unlabelled, rows, found) as perturbed:
                    return logits_of(bare(**perturbed))

            yield AdversarialBatch(dict(inputs), epsilon, rows, labels[rows], beta, perturbed_logits)
            return
        with kind.applied(dict(inputs), rows, found) as perturbed:
            yield AdversarialBatch(perturbed, epsilon, rows, labels[rows])

    def _draws(self, draw: int | Sequence[int]) -> tuple[torch.Generator, int]:
        """A generator for the choice of samples, and a seed for the attack."""
        entropy = [self.seed, *([draw] if isinstance(draw, int) else draw)]
        first, second = np.random.SeedSequence(entropy).generate_state(2).tolist()
        return torch.Generator().manual_seed(first), second

    def _rows(self, size: int, generator: torch.Generator) -> Tensor:
        """A random share of `size` samples; a fraction of a sample is rounded up with its probability."""
        count = int(self.arguments.adversarial_share * size + torch.rand((), generator=generator).item())
        return torch.randperm(size, generator=generator)[:count].sort().values
