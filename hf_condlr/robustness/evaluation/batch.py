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

from hf_condlr.errors import EvaluationError
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
    """Every attack on the samples of a batch that are classified correctly; `known` where it is of the same batch."""
    model = samples.model
    inputs, labels = samples.batch(positions)
    digest = hashlib.sha256(contents(inputs) + contents(labels)).hexdigest()
    if known is not None and known.digest == digest:
        return known
    correct, _ = predict(model, inputs, labels)
    outcome = BatchOutcome(labels.tolist(), correct.tolist(), digest=digest)
    for attack in attacks:
        start = time.perf_counter()
        index = torch.arange(len(labels)) if not attack.adversarial else correct.nonzero().squeeze(1).cpu()
        survived = torch.zeros(len(labels), dtype=torch.bool)
        if not len(index):
            has_pixels = isinstance(inputs, Tensor) and attack.within_bounds
            outcome.attacks.append(AttackOutcome(survived.tolist(), survived.tolist() if has_pixels else None))
            continue
        part, y = take(inputs, index), labels[index.to(labels.device)]
        seeded = attack.reseeded(number)
        adversarial = seeded(model, part, y)
        right, predictions = predict(model, adversarial, y)
        survived[index] = right.cpu()
        result = AttackOutcome(survived.tolist())
        distance = attack.distance(model, part, adversarial)
        result.moved = None if distance is None else distance.max().item()
        if isinstance(adversarial, Tensor) and attack.within_bounds:
            low, high = getattr(attack, "bounds", (0.0, 1.0))
            result.outside = max(0.0, low - adversarial.min().item(), adversarial.max().item() - high)
            rounded = torch.zeros_like(survived)
            rounded[index] = _survive_rounding(model, seeded, part, adversarial, y, right).cpu()
            result.survived_rounded = rounded.tolist()
        result.seconds = time.perf_counter() - start
        outcome.attacks.append(result)
        if examples is not None:
            same = [a for a in attacks if (a.name, a.epsilon) == (attack.name, attack.epsilon)]
            copy = f"-{same.index(attack) + 1}" if len(same) > 1 else ""
            path = examples / f"{attack.name}-{attack.epsilon:.4g}{copy}" / f"{number:06d}.parquet"
            numbers = [samples.indices[positions[i]] for i in index.tolist()]
            write_examples(path, numbers, y.tolist(), predictions.tolist(), adversarial)
    return outcome


def _survive_rounding(
    model: nn.Module, attack: Attack, inputs: Tensor, adversarial: Tensor, labels: Tensor, right: Tensor
) -> Tensor:  # -> (B,) bool
    """Which samples are classified correctly once their adversarial pixels are rounded to 8 bits.

    An attack that stops as soon as a sample is misclassified leaves it barely beyond the border, where rounding mends
    it: such samples are attacked once more without stopping.
    """
    survive, _ = predict(model, (adversarial * 255).round() / 255, labels)
    mended = (survive & ~right).nonzero().squeeze(1)
    if len(mended) and getattr(attack, "early_stop", False):
        deeper: Any = replace(attack, early_stop=False)  # type: ignore[type-var]
        again = deeper(model, take(inputs, mended), labels[mended])
        survive[mended], _ = predict(model, (again * 255).round() / 255, labels[mended])
    return survive


def predict(model: nn.Module, inputs: Inputs, labels: Tensor) -> tuple[Tensor, Tensor]:  # -> (B,) bool, (B,)
    """Which samples are classified correctly, and as what all are."""
    with attacked(model), torch.no_grad():
        logits = model(inputs)
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise EvaluationError(
            "the model must yield logits (batch, classes) of at least two classes",
            received=f"the shape {tuple(logits.shape)}",
            remedy="Only classifiers of whole samples are attacked.",
        )
    if int(labels.max()) >= logits.shape[1]:
        raise EvaluationError(
            f"labels must be classes of the model, 0 to {logits.shape[1] - 1}",
            received=int(labels.max()),
            remedy="Evaluate on data of the classes that the model was trained for.",
        )
    return is_correct(logits, labels), logits.argmax(1)
