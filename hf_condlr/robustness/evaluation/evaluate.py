"""`evaluate_robustness`: accuracy of a model under attack, in one process or several, with checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, extract_model_from_parallel
from torch import nn

from hf_condlr.robustness.attacks import PGD, CharacterAttack, EmbeddingPGD
from hf_condlr.robustness.attacks.base import Attack
from hf_condlr.robustness.attacks.transfer import Transfer, name_of
from hf_condlr.robustness.evaluation.batch import attack_batch
from hf_condlr.robustness.evaluation.checks import run_checks
from hf_condlr.robustness.evaluation.outcomes import BatchOutcome, Outcomes
from hf_condlr.robustness.evaluation.progress import Progress
from hf_condlr.robustness.evaluation.provenance import describe, evaluation_key, versions
from hf_condlr.robustness.evaluation.report import AttackResult, RobustnessReport
from hf_condlr.robustness.evaluation.rows import TEXTS, require
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
        seed: Seed of that choice. Attacks have their own seeds.
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

    Examples:
        >>> report = evaluate_robustness(model, test, [PGD(4 / 255, steps=20)], processor=processor, max_samples=1000)
        >>> print(report)
    """
    _require_arguments(batch_size, checks, check_samples, save_examples and output_dir is None)
    accelerator = accelerator or Accelerator()
    model = extract_model_from_parallel(model)
    if getattr(model, "hf_device_map", None) is None:
        model.to(accelerator.device)
    columns: Any = {"image_column": image_column, "text_columns": text_columns, "label_column": label_column}
    choice: Any = {"max_samples": max_samples, "seed": seed}
    samples = Samples(model, dataset, processor=processor, data_collator=data_collator, **columns, **choice)
    chosen = _chosen(attacks, samples, accelerator.device)
    settings = describe(samples, batch_size) | {"model_class": type(model).__name__} | choice
    folder = None if output_dir is None else Path(output_dir)
    [key] = broadcast_object_list([evaluation_key(settings, chosen, save_examples)])
    outcomes = Outcomes(folder and folder / f"outcomes-{key}")
    examples = folder / f"examples-{key}" if folder is not None and save_examples else None
    accelerator.wait_for_everyone()  # no process writes before all have read the old files
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
    name = name or f"{Path(name_of(model)).name}@{settings['model_digest'][:7]}"
    report = _report(name, chosen, outcomes.gather(mine))
    report.versions = versions()
    report.settings = settings | {
        "key": key,
        "samples_digest": samples.digest(report.labels),
        "checks": checks,
        "check_samples": check_samples if checks else 0,
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
    }
    if checks:
        drawn = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))  # rows may come sorted
        parts = [part.tolist() for part in drawn[:check_samples].split(batch_size)]
        report.checks = run_checks(samples, chosen, report, parts, quick=checks == "quick", show=show)
    if folder is not None and accelerator.is_main_process:
        report.save(folder / "report.json")
    return report


def _chosen(attacks: Iterable[Attack] | Attack | None, samples: Samples, device: torch.device) -> list[Attack]:
    """The attacks as a list, by default those of the data's kind; models that they transfer from move to `device`."""
    if attacks is None and samples.kind in TEXTS:
        attacks = [EmbeddingPGD(epsilon, steps=20) for epsilon in (0.01, 0.02, 0.05)]
        attacks += [CharacterAttack(0.1)] if samples.kind == "texts" else []
    elif attacks is None:
        attacks = [PGD(k / 255, steps=20, loss=loss) for k in (2, 4, 8) for loss in ("ce", "margin")]
    chosen: list[Any] = [attacks] if isinstance(attacks, Attack) else list(attacks)
    wrong = [repr(attack) for attack in chosen if not isinstance(attack, Attack)]
    remedy = "For names use hf_condlr.robustness.attacks.make_attacks(['pgd-linf'], ['4/255', '8/255'], steps=20)."
    require(chosen and not wrong, "attacks must be at least one attack", ", ".join(wrong) or "none", remedy)
    takes = {"texts": ("texts", "tokens"), "input_ids": ("tokens",)}.get(samples.kind, ("pixels",))
    rule = f"attacks must take what the data set holds, {samples.kind.replace('_', ' ')}"
    remedy = f"Choose attacks on {' or '.join(takes)}, or give the data set in another form."
    for attack in chosen:
        require(attack.takes in takes, rule, f"{attack.name}, which takes {attack.takes}", remedy)
        if isinstance(attack, Transfer):
            attack.source.to(device)
    return chosen


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
    require(checks in (True, False, "quick"), "checks must be True, False or 'quick'", repr(checks), "Choose one.")
    for name, value in (("batch_size", batch_size), ("check_samples", check_samples)):
        require(value >= 1, f"{name} must be ≥ 1", value, "checks=False leaves the checks out.")
    remedy = "Give output_dir, or leave it out."
    require(not no_folder, "save_examples needs a folder", "output_dir=None", remedy)
