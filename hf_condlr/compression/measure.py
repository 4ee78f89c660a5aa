"""What a model is worth and what it costs: quality, accuracy under attack, size, multiply-adds, latency, κ."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from hf_condlr.compression.task import Task
from hf_condlr.conversion.fold import fold_model
from hf_condlr.errors import EvaluationError, require
from hf_condlr.layers import InferenceForm, weight_matrix
from hf_condlr.linalg import condition_number
from hf_condlr.robustness.attacks.base import Attack, attacked
from hf_condlr.robustness.evaluation import evaluate_robustness
from hf_condlr.robustness.evaluation.progress import Progress

WARM_UP, ROUNDS, LEAST_ROUNDS = 2, 25, 5  # forward passes of each model for the latency
MOST_SECONDS = 20.0  # after which there are no more rounds than necessary


def quality(model: nn.Module, task: Task, rows: Dataset, title: str) -> float:
    """The task's metric over inputs that `Task.inputs` returned; NaN if a logit is NaN."""
    loader = DataLoader(rows, batch_size=task.batch_size, collate_fn=task.collator)
    total, number = 0.0, 0
    with attacked(model), torch.no_grad(), Progress(title, len(loader), show=True) as progress:
        for batch in loader:
            inputs, labels = _moved(model, batch)
            logits = model(**inputs).logits
            part, count = task.counts(logits, labels)
            total += part if torch.isfinite(logits).all() else math.nan
            number += count
            progress.advance()
    require(
        number,
        "labels must be known",
        received=f"none of {len(rows)} rows",
        remedy="Choose other data.",
        error=EvaluationError,
    )
    return task.quality(total, number)


def require_finite(value: float, task: Task, model: str) -> None:
    """Refuse a quality that is NaN.

    Raises:
        EvaluationError: It is.
    """
    rule, remedy = f"the {task.metric} of the {model} model must be a number", "Look for NaN in its weights and inputs."
    require(math.isfinite(value), rule, received=value, remedy=remedy, error=EvaluationError)


def robustness(
    model: nn.Module, task: Task, rows: Dataset, attacks: Sequence[Attack], folder: Path, *, most: int, checks: bool
) -> dict[str, Any]:
    """Attack the model on at most so many rows of `Task.columns`; `folder` keeps outcomes. Empty without attacks."""
    if not attacks:
        return {}
    report = evaluate_robustness(
        model,
        rows.remove_columns("source_row"),
        attacks,
        processor=task.processor,
        label_column="labels",
        batch_size=task.batch_size,
        max_samples=most,
        seed=task.args.seed,
        checks="quick" if checks else False,
        output_dir=folder,
    )
    return {
        "robust": {f"{attack.name}, ε = {attack.budget}": attack.robust_accuracy for attack in report.attacks},
        "clean_of_attacked": report.clean_accuracy,
        "attacked": report.samples,
        "failed_checks": [str(check) for check in report.failed_checks],
        "card_entries": report.card_entries(),
    }


def size(model: nn.Module, sample: dict[str, Tensor]) -> dict[str, int]:
    """Parameters, their bytes, and the multiply-adds of a sample: half the operations that torch counts."""
    parameters = list(model.parameters())
    # Torch counts no operations in fused attention on a CPU.
    with attacked(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**sample)
    return {
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "multiply_adds": counter.get_total_flops() // 2,
    }


def latencies(models: Iterable[nn.Module], sample: dict[str, Tensor]) -> list[float]:
    """Milliseconds of each model for a sample: the fastest of up to 25 forward passes, the models taking turns.

    Other load on the machine only adds time, and strikes all alike.
    """
    models = list(models)
    fastest = [math.inf for _ in models]
    begin = time.perf_counter()
    for turn in range(WARM_UP + ROUNDS):
        if turn >= WARM_UP + LEAST_ROUNDS and time.perf_counter() - begin > MOST_SECONDS:
            break
        for i, model in enumerate(models):
            with attacked(model), torch.no_grad():
                _synchronize()
                start = time.perf_counter()
                model(**sample)
                _synchronize()
            if turn >= WARM_UP:  # the first passes load code and fill caches
                fastest[i] = min(fastest[i], 1000 * (time.perf_counter() - start))
    return fastest


def forms(dense: nn.Module, factored: nn.Module, task: Task, rows: Dataset) -> dict[str, Any]:
    """Size and latency of the dense model and each form of the compressed one for the first row, and its shape."""
    models = {"dense": dense, "factored": factored}
    models |= {form: fold_model(copy.deepcopy(factored), form) for form in get_args(InferenceForm)}
    sample = _moved(dense, task.collator([rows[0]]))[0]
    found: dict[str, Any] = {}
    for (name, model), milliseconds in zip(models.items(), latencies(models.values(), sample), strict=True):
        found[name] = size(model, sample) | {"latency_ms": round(milliseconds, 3)}
    main = next(value for name, value in sample.items() if name in ("pixel_values", "input_ids"))
    return found | {"sample": " × ".join(map(str, main.shape[1:]))}


def largest_condition_number(model: nn.Module, names: Iterable[str]) -> float:
    """The largest κ over all singular values of the dense weights of these layers; inf if one is singular."""
    weights = (weight_matrix(model.get_submodule(name)).detach() for name in names)
    return max(float(condition_number(W)) for W in weights)


def _moved(model: nn.Module, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and labels on the model's device, pixels in its dtype."""
    parameter = next(model.parameters())
    moved = {name: value.to(parameter.device) for name, value in batch.items()}
    labels = moved.pop("labels")
    return {n: v.to(parameter.dtype) if v.is_floating_point() else v for n, v in moved.items()}, labels


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
