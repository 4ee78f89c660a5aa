"""Attacks on one batch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_condlr.robustness.attacks.base import Attack, Inputs, attacked, take
from hf_condlr.robustness.attacks.losses import is_correct
from hf_condlr.robustness.evaluation.outcomes import AttackOutcome, BatchOutcome, write_examples
from hf_condlr.robustness.evaluation.rows import require
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
        part, y, seeded = take(inputs, index), labels[index.to(labels.device)], attack.reseeded(number)
        adversarial = seeded(model, part, y)
        right, predictions = predict(model, adversarial, y)
        distance = seeded.distance(model, part, adversarial)
        moved = None if distance is None else distance.max().item()
        result = AttackOutcome(_of_batch(right, index, len(labels)), moved=moved)
        if _has_pixels(adversarial, attack):
            result.outside = max(0.0, -adversarial.min().item(), adversarial.max().item() - 1)
            rounded = _survive_rounding(model, seeded, part, adversarial, y, right)
            result.survived_rounded = _of_batch(rounded, index, len(labels))
        result.seconds = time.perf_counter() - start
        outcome.attacks.append(result)
        if examples is not None:
            same = [k for k, a in enumerate(attacks) if (a.name, a.epsilon) == (attack.name, attack.epsilon)]
            copy = f"-{same.index(i) + 1}" if len(same) > 1 else ""
            path = examples / f"{attack.name}-{attack.epsilon:.4g}{copy}" / f"{number:06d}.parquet"
            numbers = [samples.indices[positions[k]] for k in index.tolist()]
            write_examples(path, numbers, y.tolist(), predictions.tolist(), adversarial)
    return outcome


def _of_batch(flags: Tensor, index: Tensor, size: int) -> list[bool]:  # (k,), (k,) bool
    """The flags of the samples `index` as flags of a batch, False for its other samples."""
    return torch.zeros(size, dtype=torch.bool).index_copy(0, index, flags.cpu()).tolist()


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
    shape, remedy = tuple(logits.shape), "Only models that give one class per sample are attacked."
    rule = "the model must yield logits (batch, classes) of at least two classes"
    require(len(shape) == 2 and shape[1] >= 2, rule, f"the shape {shape}", remedy)
    rule, remedy = f"labels must be classes of the model, 0 to {shape[1] - 1}", "Evaluate on data of these classes."
    require(int(labels.max()) < shape[1], rule, int(labels.max()), remedy)
    return is_correct(logits, labels), logits.argmax(1)
