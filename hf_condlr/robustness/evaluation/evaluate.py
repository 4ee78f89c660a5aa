"""`evaluate_robustness`: accuracy of a model under attack, in one process or several, with checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, extract_model_from_parallel
from torch import nn

from hf_condlr.errors import EvaluationError, require
from hf_condlr.robustness.attacks import PGD, CharacterAttack, EmbeddingPGD
from hf_condlr.robustness.attacks.base import Attack
from hf_condlr.robustness.attacks.transfer import name_of
from hf_condlr.robustness.evaluation.batch import attack_batch
from hf_condlr.robustness.evaluation.outcomes import BatchOutcome, Outcomes
from hf_condlr.robustness.evaluation.progress import Progress
from hf_condlr.robustness.evaluation.provenance import evaluation_key, normalisation, parameters_digest, versions
from hf_condlr.robustness.evaluation.report import AttackResult, RobustnessReport
from hf_condlr.robustness.evaluation.rows import TEXTS
from hf_condlr.robustness.evaluation.run_checks import run_checks
from hf_condlr.robustness.evaluation.samples import Samples


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
    checks: bool | Literal["quick"] = True,
    check_samples: int = 128,
    output_dir: str | Path | None = None,
    save_examples: bool = False,
    accelerator: Accelerator | None = None,
    progress: bool = True,
) -> RobustnessReport:
    """Attack a classifier on a data set, and check how far the result can be trusted.

    Every sample that is classified correctly is attacked by every attack; a misclassified sample counts as wrong under
    all. The outcome does not depend on the number of processes: batches are fixed, and each has its own random starts.
    Parameters, gradients, training flags and random states of the model stay as they are; it moves to the
    accelerator's device.

    Args:
        model: An image or text classifier of transformers, any module that gives logits, or one of them as
            `PixelModel` or `TextModel`; factored, folded or dense.
        dataset: Rows with images and labels, `pixel_values`, one or two texts, `input_ids`; or pairs (pixels, label).
        attacks: Attacks of `hf_condlr.robustness.attacks`; by default PGD with cross entropy and margin loss at ε = 2,
            4, 8 of 255, for texts on embeddings at ε = 0.01, 0.02, 0.05, and the character attack on 10 % of the words.
        processor: The model's image processor or tokenizer.
        name: Name of the model in the report; by default where it was loaded from, or its class, with the first digits
            of its parameters' digest, which tell fine-tuned models of one origin apart.
        data_collator: Joins rows of `pixel_values` or `input_ids`.
        image_column: Column of images, where there are several.
        text_columns: Columns of texts, where there are several and not a pair of usual names (premise and hypothesis).
        label_column: Column of labels, where it is not `labels`, `label` or `label_ids`.
        batch_size: Samples attacked together, in each process.
        max_samples: Number of samples, drawn with `seed`, the same for every model; None for all.
        seed: Seed of that choice. Attacks have seeds of their own.
        checks: Whether to look for signs that the numbers are too good, by further attacks on a few samples; "quick"
            leaves out the attacks of more than one step, which may take longer than the evaluation itself.
        check_samples: Number of samples that are attacked again.
        output_dir: Folder for the outcomes, from which an interrupted evaluation resumes, and for `report.json`.
        save_examples: Write adversarial examples to `output_dir/examples-KEY`, a folder of parquet files for each
            attack. The report states the key, which differs for another model, data set or choice of attacks.
        accelerator: The one in use, if there is one.
        progress: Show a bar in a terminal, and lines with the time left elsewhere.

    Returns:
        The report: table, figures, per-sample outcomes, checks, parameters and versions.

    Raises:
        EvaluationError: The data do not fit, or hold labels that are not class numbers.
        AttackError: An attack does not fit the model or its inputs.

    Example:
        >>> report = evaluate_robustness(model, test, [PGD(4 / 255, steps=20)], processor=processor, max_samples=1000)
        >>> print(report)
    """
    _require_arguments(batch_size, checks, check_samples, save_examples and output_dir is None)
    accelerator = accelerator or Accelerator()
    model = extract_model_from_parallel(model)
    if getattr(model, "hf_device_map", None) is None:
        model.to(accelerator.device)
    samples = Samples(
        model,
        dataset,
        processor=processor,
        data_collator=data_collator,
        image_column=image_column,
        text_columns=text_columns,
        label_column=label_column,
        max_samples=max_samples,
        seed=seed,
    )
    attacks = default_attacks(samples) if attacks is None else attacks
    chosen = [attacks] if isinstance(attacks, Attack) else list(attacks)
    _require_attacks(chosen, samples)
    for source in (getattr(attack, "source", None) for attack in chosen):
        if isinstance(source, nn.Module):
            source.to(accelerator.device)
    settings = {
        **_settings(model, samples, batch_size),
        "data_fingerprint": getattr(dataset, "_fingerprint", None),
        "max_samples": max_samples,
        "seed": seed,
    }
    folder = None if output_dir is None else Path(output_dir)
    [key] = broadcast_object_list([evaluation_key(settings, chosen, save_examples)])
    outcomes = Outcomes(folder and folder / f"outcomes-{key}")
    examples = folder / f"examples-{key}" if folder is not None and save_examples else None
    accelerator.wait_for_everyone()  # nobody writes before all have read what is there
    positions = [range(i, min(i + batch_size, len(samples))) for i in range(0, len(samples), batch_size)]
    mine = range(len(positions))[accelerator.process_index :: accelerator.num_processes]
    show = progress and accelerator.is_local_main_process
    title = f"{len(chosen)} attack{'s' * (len(chosen) > 1)} on {len(samples)} samples"
    with Progress(title, len(mine), show=show) as shown:
        for number in mine:
            known = outcomes.batches.get(number)
            outcome = attack_batch(samples, positions[number], chosen, number, known=known, examples=examples)
            outcomes.add(number, outcome)
            shown.advance()
    report = _report(
        name or f"{Path(name_of(model)).name}@{settings['model_digest'][:7]}", chosen, outcomes.gather(mine)
    )
    report.settings = settings | {
        "key": key,
        "samples_digest": samples.digest(report.labels),
        "checks": checks,
        "check_samples": check_samples if checks else 0,
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
    }
    report.versions = versions()
    if checks:
        report.checks = run_checks(
            samples,
            chosen,
            report,
            check_samples=check_samples,
            batch_size=batch_size,
            seed=seed,
            quick=checks == "quick",
            show=show,
        )
    if folder is not None and accelerator.is_main_process:
        report.save(folder / "report.json")
    return report


def default_attacks(samples: Samples) -> list[Attack]:
    """The attacks of an evaluation where none are named."""
    if samples.kind in TEXTS:
        attacks: list[Attack] = [EmbeddingPGD(epsilon, steps=20) for epsilon in (0.01, 0.02, 0.05)]
        return [*attacks, CharacterAttack(0.1)] if samples.kind == "texts" else attacks
    return [PGD(k / 255, steps=20, loss=loss) for k in (2, 4, 8) for loss in ("ce", "margin")]


def _settings(model: nn.Module, samples: Samples, batch_size: int) -> dict[str, Any]:
    return {
        "model_class": type(model).__name__,
        "model_digest": parameters_digest(samples.model),
        "dtype": str(next((p.dtype for p in model.parameters()), torch.float32)).removeprefix("torch."),
        "data": samples.kind,
        "columns": [*samples.columns, samples.label_column],
        "processor": type(samples.processor).__name__ if samples.processor is not None else None,
        "data_rows": len(samples.dataset),
        "data_digest": samples.fingerprint(batch_size),
        "batch_size": batch_size,
        **normalisation(samples.model),
    }


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
        result.largest_excess = max((outcome.outside for outcome in outcomes), default=0.0)
        result.seconds = round(sum(outcome.seconds for outcome in outcomes), 3)
        results.append(result)
    labels = [label for batch in batches for label in batch.labels]
    return RobustnessReport(name, labels, [flag for batch in batches for flag in batch.correct], results)


def _require_arguments(batch_size: int, checks: object, check_samples: int, no_folder: bool) -> None:
    known = checks in (True, False, "quick")
    rule = "checks must be True, False or 'quick'"
    require(known, rule, received=repr(checks), remedy="Choose one.", error=EvaluationError)
    for name, value in (("batch_size", batch_size), ("check_samples", check_samples)):
        remedy = "checks=False leaves the checks out."
        require(value >= 1, f"{name} must be ≥ 1", received=value, remedy=remedy, error=EvaluationError)
    rule, remedy = "save_examples needs a folder", "Give output_dir, or leave it out."
    require(not no_folder, rule, received="output_dir=None", remedy=remedy, error=EvaluationError)


def _require_attacks(attacks: Sequence[Attack], samples: Samples) -> None:
    wrong = [repr(attack) for attack in attacks if not isinstance(attack, Attack)]
    require(
        attacks and not wrong,
        "attacks must be at least one attack",
        received=", ".join(wrong) or "none",
        remedy="For names use hf_condlr.robustness.attacks.make_attacks(['pgd-linf'], ['4/255', '8/255'], steps=20).",
        error=EvaluationError,
    )
    takes = {"texts": ("texts", "tokens"), "input_ids": ("tokens",)}.get(samples.kind, ("pixels",))
    for attack in attacks:
        require(
            attack.takes in takes,
            f"attacks must take what the data set holds, {samples.kind.replace('_', ' ')}",
            received=f"{attack.name}, which takes {attack.takes}",
            remedy="Choose attacks on " + " or ".join(takes) + ", or give the data set in another form.",
            error=EvaluationError,
        )
