"""The checks of an evaluation: signs that an attack failed where a model did not resist.

After Athalye et al. 2018 (obfuscated gradients) and Carlini et al. 2019 (on evaluating adversarial robustness). Checks
by further attacks are in `attack_checks.py`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from hf_condlr.robustness.attacks import PixelModel
from hf_condlr.robustness.attacks.base import Attack, Inputs, attacked
from hf_condlr.robustness.evaluation.attack_checks import CheckBatch, allowed, attack_checks, checked_cases
from hf_condlr.robustness.evaluation.progress import Progress
from hf_condlr.robustness.evaluation.provenance import parameters_digest
from hf_condlr.robustness.evaluation.report import AttackResult, Check, RobustnessReport
from hf_condlr.robustness.evaluation.samples import Samples

logger = logging.getLogger(__name__)


def run_checks(
    samples: Samples,
    attacks: Sequence[Attack],
    report: RobustnessReport,
    parts: Sequence[Sequence[int]],
    *,
    quick: bool,
    show: bool,
) -> list[Check]:
    """Run all checks, or the quick ones, and warn of those that fail. Every process runs them, with the same result.

    `parts` are the positions of the samples to attack again, batch by batch.
    """
    batches = [CheckBatch(positions, *samples.batch(positions)) for positions in parts]
    steps = max((getattr(attack, "steps", 0) for attack in attacks), default=0)
    cases = [*checked_cases(samples.model, batches, report.correct, report.worst_cases, steps)]
    further = []
    with Progress("checks", sum(sum(case.costs(quick)) for case in cases), show=show) as progress:
        for case in cases:
            for check, cost in zip(attack_checks(case, quick=quick), case.costs(quick), strict=True):
                further.append(check)
                progress.advance(cost)
    found = [
        *check_outcomes(attacks, report, len(samples)),
        *check_model(samples, batches[0], report.settings["model_digest"]),
        *further,
    ]
    for check in found:
        if check.passed is False:
            logger.warning("%s: %s", report.model, check)
    return found


def check_outcomes(attacks: Sequence[Attack], report: RobustnessReport, expected: int) -> Iterator[Check]:
    """Check that all samples were counted, that attacks kept their threat model, and that more budget does more."""
    n, results = report.samples, report.attacks
    yield Check(
        "every sample counted once",
        n == expected and all(len(result.survived) == n for result in results) and len(results) == len(attacks),
        f"{n} outcomes of {expected} samples",
        "A process or a batch is missing, or samples were repeated: the denominator is wrong.",
    )
    measured = [(result, d) for result in results if (d := result.largest_distance) is not None]
    outside = max((result.largest_excess for result in results), default=0.0)
    # x + δ in float32 has rounding errors.
    over = [(result, d) for result, d in measured if d > result.epsilon * (1 + 1e-5) + 1e-6]
    yield Check(
        "examples within the ball and the bounds",
        not over and outside <= 1e-6 if measured else None,
        "; ".join(f"{result.name} at ε = {result.epsilon:.4g}: {d:.6g}" for result, d in over)
        or f"{len(measured)} attacks measured, at most {outside:.1e} outside the bounds",
        "An attack left its threat model: its robust accuracy is too low.",
    )
    yield _falls_with_epsilon(attacks, results, n)
    gains = [(a.rounded_accuracy - a.robust_accuracy, a.name) for a in results if a.rounded_accuracy is not None]
    gain, name = max(gains, default=(0.0, ""))
    yield Check(
        "examples hold as 8-bit images",
        gain <= max(0.02, 1 / n) if gains else None,
        f"at most {gain:.1%} more are classified correctly" + (f", under {name}" if name else ""),
        "The attack relies on differences smaller than a pixel's step: saved as images its examples are harmless.",
    )


def _falls_with_epsilon(attacks: Sequence[Attack], results: Sequence[AttackResult], n: int) -> Check:
    rises, series = [], 0
    by_family: dict[str, list[AttackResult]] = {}
    for attack, result in zip(attacks, results, strict=False):
        if attack.adversarial:  # a stronger corruption does not contain a weaker one
            by_family.setdefault(repr(attack.with_epsilon(0)), []).append(result)
    for family in by_family.values():
        series += len(family) > 1
        for weak, strong in itertools.pairwise(sorted(family, key=lambda result: result.epsilon)):
            if sum(strong.survived) - sum(weak.survived) > allowed(n, 0.005):
                at = [f"{result.robust_accuracy:.1%} at {result.epsilon:.4g}" for result in (weak, strong)]
                rises.append(f"{strong.name}: {', '.join(at)}")
    return Check(
        "robust accuracy falls with ε",
        not rises if series else None,
        "; ".join(rises) or (f"in all {series} series" if series else "one budget for each attack"),
        "A larger ball contains the smaller one: the attack does not find what is there.",
    )


def check_model(samples: Samples, batch: CheckBatch, digest: str) -> Iterator[Check]:
    """Check the model's logits on one batch, and that it is the model whose parameters had this digest."""
    model = samples.model
    with attacked(model), torch.no_grad():
        logits, again = model(batch.inputs), model(batch.inputs)
        own = samples.own_logits(batch.positions)
    scale = logits.abs().max().clamp_min(1e-30)
    difference = ((logits - again).abs().max() / scale).item()
    yield Check(
        "logits are repeatable",
        difference <= 1e-5 and bool(logits.isfinite().all()),
        f"a relative difference of {difference:.1e} between two calls",
        "The model is random (dropout in evaluation mode?) or its logits are not finite: attack its expectation.",
    )
    yield Check(
        "outputs are logits",
        not _are_probabilities(logits),
        f"values from {logits.min().item():.3g} to {logits.max().item():.3g}",
        "Rows sum to 1: after a softmax the gradients of confident samples vanish. Return the logits before it.",
    )
    yield _spread(model, batch.inputs)
    half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    yield Check(
        "float32 in the attack",
        logits.dtype in (torch.float32, torch.float64) and not half,
        f"logits in {str(logits.dtype).removeprefix('torch.')}" + (", parameters in half precision" if half else ""),
        "Half precision rounds the loss that is maximised, and its gradient: attack model.float().",
    )
    same = digest == parameters_digest(model)
    gap = None if own is None else ((logits - own).abs().max() / scale).item()
    yield Check(
        "the attacked model is the model",
        same and (gap is None or gap <= (0.1 if half else 1e-3)),
        ("its parameters stayed" if same else "its parameters changed")
        + ("" if gap is None else f"; logits differ by {gap:.1e} from those of its own preprocessing"),
        "Another normalisation, tokenisation or state than the one in use was attacked.",
    )


def _spread(model: nn.Module, pixels: Inputs) -> Check:
    """Check that normalised pixels have roughly the mean 0 and the standard deviation 1 that normalisation aims at."""
    passed, found = None, "no normalisation"
    if isinstance(model, PixelModel) and isinstance(pixels, Tensor) and bool((model.std < 1).any()):
        values, ends = model.normalize(pixels), (pixels == 0) | (pixels == 1)
        mean, deviation = values.mean().item(), values.std().item()
        passed = 0.25 <= deviation <= 4 and (abs(mean) <= 2 or deviation >= 0.5)
        found = f"normalised pixels of mean {mean:.2g} and standard deviation {deviation:.2g}"
        found += f"; {ends.float().mean().item():.1%} of them black or white"
    return Check(
        "pixels are spread as the processor expects",
        passed,
        found,
        "Images are almost black, white or flat for this normalisation: their type or range was read wrongly.",
    )


def _are_probabilities(logits: Tensor) -> bool:
    return bool(((logits >= 0) & (logits <= 1)).all() and (logits.sum(1) - 1).abs().max() < 1e-4)
