"""One batch under every attack."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_condlr.errors import EvaluationError, require
from hf_condlr.robustness.attacks.base import Attack, Inputs, attacked, take
from hf_condlr.robustness.attacks.losses import is_correct
from hf_condlr.robustness.evaluation.examples import write_examples
from hf_condlr.robustness.evaluation.outcomes import AttackOutcome, BatchOutcome
from hf_condlr.robustness.evaluation.samples import Samples, contents


def attack_batch(
    samples: Samples,
    positions: Sequence[int],
    attacks: Sequence[Attack],
    number: int,
    *,
    known: BatchOutcome | None = None,
    examples: Path | None = None,
) -> BatchOutcome:
    """The outcome of every attack on a batch's correctly classified samples; `known` if it is of the same batch."""
    model = samples.model
    inputs, labels = samples.batch(positions)
    digest = hashlib.sha256(contents(inputs) + contents(labels)).hexdigest()
    if known is not None and known.digest == digest:
        return known
    correct, _ = predict(model, inputs, labels)
    outcome = BatchOutcome(samples.data_labels(labels.tolist()), correct.tolist(), digest=digest)
    for i, attack in enumerate(attacks):
        index = correct.nonzero().squeeze(1).cpu() if attack.adversarial else torch.arange(len(labels))
        if not len(index):
            none = [False] * len(labels)
            outcome.attacks.append(AttackOutcome(none, none if _has_pixels(inputs, attack) else None))
            continue
        start = time.perf_counter()
        part, y = take(inputs, index), labels[index.to(labels.device)]
        adversarial, predictions, result = _attack_samples(model, part, y, attack.reseeded(number))
        result.survived = _of_batch(result.survived, index, len(labels))
        if result.survived_rounded is not None:
            result.survived_rounded = _of_batch(result.survived_rounded, index, len(labels))
        result.seconds = time.perf_counter() - start
        outcome.attacks.append(result)
        if examples is not None:
            same = [k for k, a in enumerate(attacks) if (a.name, a.epsilon) == (attack.name, attack.epsilon)]
            copy = f"-{same.index(i) + 1}" if len(same) > 1 else ""
            path = examples / f"{attack.name}-{attack.epsilon:.4g}{copy}" / f"{number:06d}.parquet"
            numbers = [samples.indices[positions[k]] for k in index.tolist()]
            write_examples(path, numbers, y.tolist(), predictions.tolist(), adversarial)
    return outcome


def _attack_samples(
    model: nn.Module, inputs: Inputs, labels: Tensor, attack: Attack
) -> tuple[Inputs, Tensor, AttackOutcome]:
    """Adversarial examples of the given samples, their predicted classes, and the outcome for these samples."""
    adversarial = attack(model, inputs, labels)
    right, predictions = predict(model, adversarial, labels)
    outcome = AttackOutcome(right.tolist())
    distance = attack.distance(model, inputs, adversarial)
    outcome.moved = None if distance is None else distance.max().item()
    if _has_pixels(adversarial, attack):
        low, high = getattr(attack, "bounds", (0.0, 1.0))
        outcome.outside = max(0.0, low - adversarial.min().item(), adversarial.max().item() - high)
        outcome.survived_rounded = _survive_rounding(model, attack, inputs, adversarial, labels, right).tolist()
    return adversarial, predictions, outcome


def _of_batch(flags: list[bool], index: Tensor, size: int) -> list[bool]:
    """The flags of the samples `index` as flags of a batch, False for its other samples."""
    found = dict(zip(index.tolist(), flags, strict=True))
    return [found.get(i, False) for i in range(size)]


def _has_pixels(inputs: Inputs, attack: Attack) -> bool:
    return isinstance(inputs, Tensor) and attack.within_bounds


def _survive_rounding(
    model: nn.Module, attack: Attack, inputs: Tensor, adversarial: Tensor, labels: Tensor, right: Tensor
) -> Tensor:  # -> (B,) bool
    """Which samples are classified correctly once their adversarial pixels are rounded to 8 bits.

    An attack that stops as soon as a sample is misclassified leaves it just beyond the decision boundary, where
    rounding may correct it: such samples are attacked once more without stopping.
    """
    survive, _ = predict(model, (adversarial * 255).round() / 255, labels)
    corrected = (survive & ~right).nonzero().squeeze(1)
    if len(corrected) and getattr(attack, "early_stop", False):
        deeper: Any = replace(attack, early_stop=False)  # type: ignore[type-var]
        again = deeper(model, take(inputs, corrected), labels[corrected])
        survive[corrected], _ = predict(model, (again * 255).round() / 255, labels[corrected])
    return survive


def predict(model: nn.Module, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:  # -> (B,) bool, (B,)
    """Which samples are classified correctly, and the class predicted for each."""
    with attacked(model), torch.no_grad():
        logits = model(inputs)
    require(
        logits.dim() == 2 and logits.shape[1] >= 2,
        "the model must yield logits (batch, classes) of at least two classes",
        received=f"the shape {tuple(logits.shape)}",
        remedy="Only classifiers of whole samples are attacked.",
        error=EvaluationError,
    )
    require(
        int(labels.max()) < logits.shape[1],
        f"labels must be classes of the model, 0 to {logits.shape[1] - 1}",
        received=int(labels.max()),
        remedy="Evaluate on data of the classes that the model was trained for.",
        error=EvaluationError,
    )
    return is_correct(logits, labels), logits.argmax(1)
