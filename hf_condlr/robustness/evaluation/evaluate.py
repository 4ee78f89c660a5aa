"""`evaluate_robustness`: accuracy of a model under attack, on one process or many, with the checks that it needs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, extract_model_from_parallel
from torch import nn
from tqdm.auto import tqdm

from hf_condlr.errors import EvaluationError
from hf_condlr.robustness.attacks import PGD, CharacterAttack, EmbeddingPGD
from hf_condlr.robustness.attacks.base import Attack
from hf_condlr.robustness.attacks.transfer import name_of
from hf_condlr.robustness.evaluation.attack_checks import challengers, challenges
from hf_condlr.robustness.evaluation.batch import attack_batch
from hf_condlr.robustness.evaluation.checks import Check, CheckBatch, check_model, check_outcomes
from hf_condlr.robustness.evaluation.outcomes import BatchOutcome, Outcomes
from hf_condlr.robustness.evaluation.provenance import evaluation_key, normalisation, parameters_digest, versions
from hf_condlr.robustness.evaluation.report import AttackResult, RobustnessReport
from hf_condlr.robustness.evaluation.samples import TEXTS, Samples

logger = logging.getLogger(__name__)


@torch.inference_mode(False)  # what is made in that mode cannot be differentiated
def evaluate_robustness(
    model: nn.Module,
    dataset: Any,
    attacks: Iterable[Attack] | Attack | None = None,
    *,
    processor: Any = None,
    name: str | None = None,
    data_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    image_column: str | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    batch_size: int = 64,
    max_samples: int | None = None,
    seed: int = 0,
    checks: bool = True,
    check_samples: int = 128,
    output_dir: str | Path | None = None,
    save_examples: bool = False,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> RobustnessReport:
    """Attack a classifier on a data set, and say how much the result can be trusted.

    Every sample that is classified correctly meets every attack; one that is wrong already counts as wrong under all.
    Outcomes do not depend on the number of processes: batches are fixed, and each has random starts of its own.
    Parameters, gradients, training flags and random states of the model stay as they are; it moves to the
    accelerator's device.

    Args:
        model: An image or text classifier of transformers, any module that yields logits, or one of them as
            `PixelModel` or `TextModel`. Factored, folded or dense.
        dataset: Rows with images and labels, `pixel_values`, one or two texts, `input_ids`; or pairs (pixels, label).
        attacks: From `hf_condlr.attacks`; by default PGD with cross entropy and margin loss at ε = 2, 4, 8 of 255, for
            texts on embeddings at ε = 0.01, 0.02, 0.05, and the character attack on 10 % of the words.
        processor: The model's image processor or tokenizer.
        name: Of the model in the report; by default what it was loaded from, or its class.
        data_collator: Joins rows of `pixel_values` or `input_ids`.
        image_column: Where there are several.
        text_columns: Where there are several, unless they are a pair of usual names, such as premise and hypothesis.
        label_column: Where it is not `labels`, `label` or `label_ids`.
        batch_size: Samples attacked together, on each process.
        max_samples: So many, drawn with `seed`, the same for every model.
        seed: Of that choice. Attacks have a seed of their own.
        checks: Whether to look for signs that the numbers are too good, by further attacks on a few samples.
        check_samples: So many.
        output_dir: Where outcomes are kept, to go on from after an interruption, and the report, `report.json`.
        save_examples: Write adversarial examples to `output_dir/examples-KEY`, a folder of parquet for each attack; the
            report states the key, which another model, data set or choice of attacks changes.
        accelerator: The one in use, if there is one.
        progress: Show a bar.

    Returns:
        The report: table, figures, per-sample outcomes, checks, parameters and versions.

    Raises:
        EvaluationError: The data do not fit, or hold labels that are no class numbers.
        AttackError: An attack does not fit the model or its inputs.

    Example:
        >>> report = evaluate_robustness(model, test, [PGD(4 / 255, steps=20)], processor=processor, max_samples=1000)
        >>> print(report)
    """
    accelerator = accelerator or Accelerator()
    model = extract_model_from_parallel(model)
    if getattr(model, "hf_device_map", None) is None:
        model.to(accelerator.device)
    columns: dict[str, Any] = {
        "image_column": image_column,
        "text_columns": text_columns,
        "label_column": label_column,
    }
    samples = Samples(
        model, dataset, processor=processor, data_collator=data_collator, max_samples=max_samples, seed=seed, **columns
    )
    attacks = default_attacks(samples) if attacks is None else attacks
    chosen = [attacks] if isinstance(attacks, Attack) else list(attacks)
    _require_arguments(chosen, samples, batch_size, check_samples, save_examples and output_dir is None)
    for source in (getattr(attack, "source", None) for attack in chosen):
        if isinstance(source, nn.Module):
            source.to(accelerator.device)
    digest = parameters_digest(samples.model)
    settings: dict[str, Any] = {
        "model_class": type(model).__name__,
        "model_digest": digest,
        "dtype": str(next((p.dtype for p in model.parameters()), torch.float32)).removeprefix("torch."),
        "data": samples.kind,
        "columns": [*samples.columns, samples.label_column],
        "processor": type(samples.processor).__name__ if samples.processor is not None else None,
        "data_fingerprint": getattr(dataset, "_fingerprint", None),
        "data_rows": len(dataset),
        "data_digest": samples.fingerprint(batch_size),
        "batch_size": batch_size,
        "max_samples": max_samples,
        "seed": seed,
    } | normalisation(samples.model)
    folder = None if output_dir is None else Path(output_dir)
    [key] = broadcast_object_list([evaluation_key(settings, chosen, save_examples)])
    outcomes = Outcomes(folder and folder / f"outcomes-{key}")
    examples = folder / f"examples-{key}" if folder is not None and save_examples else None
    accelerator.wait_for_everyone()  # nobody writes before all have read what is there
    positions = [range(i, min(i + batch_size, len(samples))) for i in range(0, len(samples), batch_size)]
    mine = range(len(positions))[accelerator.process_index :: accelerator.num_processes]
    with tqdm(total=len(mine), desc="attacks", unit="batch", disable=_silent(progress, accelerator)) as bar:
        for number in mine:
            known = outcomes.batches.get(number)
            outcome = attack_batch(samples, positions[number], chosen, number, known=known, examples=examples)
            outcomes.add(number, outcome)
            bar.update()
    report = _report(name or Path(name_of(model)).name, chosen, outcomes.gather(mine))
    report.settings = settings | {
        "key": key,
        "samples_digest": samples.digest(report.labels),
        "check_samples": check_samples if checks else 0,
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
    }
    report.versions = versions()
    if checks:
        drawn = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))  # rows may come sorted
        batches = [_check_batch(samples, part.tolist()) for part in drawn[:check_samples].split(batch_size)]
        report.checks = _run_checks(samples, batches, chosen, report, list(outcomes.batches.values()), digest)
    if folder is not None and accelerator.is_main_process:
        report.save(folder / "report.json")
    return report


def default_attacks(samples: Samples) -> list[Attack]:
    """What is asked of a model where nobody says more."""
    if samples.kind in TEXTS:
        attacks: list[Attack] = [EmbeddingPGD(epsilon, steps=20) for epsilon in (0.01, 0.02, 0.05)]
        return [*attacks, CharacterAttack(0.1)] if samples.kind == "texts" else attacks
    return [PGD(k / 255, steps=20, loss=loss) for k in (2, 4, 8) for loss in ("ce", "margin")]


def _report(name: str, attacks: Sequence[Attack], batches: Sequence[BatchOutcome]) -> RobustnessReport:
    results = []
    for i, attack in enumerate(attacks):
        outcomes = [batch.attacks[i] for batch in batches]
        survived = [flag for outcome in outcomes for flag in outcome.survived]
        rounded = [outcome.survived_rounded for outcome in outcomes if outcome.survived_rounded is not None]
        moved = [outcome.moved for outcome in outcomes if outcome.moved is not None]
        result = AttackResult(attack.name, attack.threat, attack.epsilon, survived, settings=attack.settings())
        result.rounded_accuracy = sum(map(sum, rounded)) / len(survived) if rounded else None
        result.largest_distance = max(moved, default=None)
        result.seconds = round(sum(outcome.seconds for outcome in outcomes), 3)
        results.append(result)
    labels = [label for batch in batches for label in batch.labels]
    return RobustnessReport(name, labels, [flag for batch in batches for flag in batch.correct], results)


def _check_batch(samples: Samples, positions: Sequence[int]) -> CheckBatch:
    inputs, labels = samples.batch(positions)
    return CheckBatch(list(positions), inputs, labels)


def _run_checks(
    samples: Samples,
    batches: Sequence[CheckBatch],
    attacks: Sequence[Attack],
    report: RobustnessReport,
    outcomes: Sequence[BatchOutcome],
    digest: str,
) -> list[Check]:
    """All checks; the failed ones are warned of. Every process runs them and comes to the same."""
    steps = max((getattr(attack, "steps", 0) for attack in attacks), default=0)
    further = [
        check
        for challenger in challengers(samples.model, batches, report.correct, report.worst_cases, steps)
        for check in challenges(challenger)
    ]
    found = [
        *check_outcomes(attacks, outcomes, len(samples)),
        *check_model(samples.model, batches, samples.own_logits, (digest, parameters_digest(samples.model))),
        *further,
    ]
    for check in found:
        if check.passed is False:
            logger.warning("%s: %s", report.model, check)
    return found


def _silent(progress: bool, accelerator: Accelerator) -> bool | None:
    """None: a bar where there is a terminal."""
    return None if progress and accelerator.is_local_main_process else True


def _require_arguments(
    attacks: Sequence[Attack], samples: Samples, batch_size: int, check_samples: int, nowhere: bool
) -> None:
    for name, value in (("batch_size", batch_size), ("check_samples", check_samples)):
        if value < 1:
            raise EvaluationError(f"{name} must be ≥ 1", received=value, remedy="checks=False leaves the checks out.")
    if nowhere:
        raise EvaluationError(
            "save_examples needs a folder", received="output_dir=None", remedy="Give output_dir, or leave it out."
        )
    wrong = [repr(attack) for attack in attacks if not isinstance(attack, Attack)]
    if wrong or not attacks:
        raise EvaluationError(
            "attacks must be at least one attack",
            received=", ".join(wrong) or "none",
            remedy="For names there is hf_condlr.attacks.make_attacks(['pgd-linf'], ['4/255', '8/255'], steps=20).",
        )
    takes = {"texts": ("texts", "tokens"), "input_ids": ("tokens",)}.get(samples.kind, ("pixels",))
    for attack in attacks:
        if attack.takes not in takes:
            raise EvaluationError(
                f"attacks must take what the data set holds, {samples.kind.replace('_', ' ')}",
                received=f"{attack.name}, which takes {attack.takes}",
                remedy="Choose attacks on " + " or ".join(takes) + ", or give the data set in another form.",
            )
