"""All checks of an evaluation."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from hf_condlr.robustness.attacks.base import Attack
from hf_condlr.robustness.evaluation.attack_checks import attack_checks, checked_cases
from hf_condlr.robustness.evaluation.checks import Check, CheckBatch
from hf_condlr.robustness.evaluation.model_checks import check_model
from hf_condlr.robustness.evaluation.outcome_checks import check_outcomes
from hf_condlr.robustness.evaluation.progress import Progress
from hf_condlr.robustness.evaluation.report import RobustnessReport
from hf_condlr.robustness.evaluation.samples import Samples

logger = logging.getLogger(__name__)


def run_checks(
    samples: Samples,
    attacks: Sequence[Attack],
    report: RobustnessReport,
    *,
    check_samples: int,
    batch_size: int,
    seed: int,
    quick: bool = False,
    show: bool = False,
) -> list[Check]:
    """Run all checks, or the quick ones, and warn of those that fail. Every process runs them, with the same result."""
    drawn = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))  # rows may come sorted
    parts = [part.tolist() for part in drawn[:check_samples].split(batch_size)]
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
