"""The YAML header of a model card: base model, task, and measurements as a model index."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import nn

from hf_condlr.errors import require

SOURCE = {"url": "https://arxiv.org/abs/2306.01485", "name": "hf_condlr"}
MARK = " (hf_condlr)"
"""Ends the names of this package's results: huggingface_hub groups results of one data set, also of several sources."""


def is_hub_id(name: object) -> bool:
    """Whether `name` reads "user/name" or "name"."""
    try:
        validate_repo_id(cast(str, name))
    except HFValidationError:
        return False
    return name is not None


def base_model_of(model: nn.Module, model_id: str | None) -> str | None:
    """The name on the Hub that the model was loaded from; None for a folder, and for the model's own name."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    # The relative path of a checkpoint that was removed would pass for "user/name".
    if not name or name == model_id or Path(name).is_dir() or re.search(r"(^|/)checkpoint-\d+$", name):
        return None
    return name if is_hub_id(name) else None


def pipeline_tag(model: nn.Module) -> str | None:
    """The Hub's name for the task of the model's class; None for a class with several tasks, or none."""
    from transformers.modelcard import TASK_MAPPING  # imports the Trainer's arguments

    model_type = getattr(getattr(model, "config", None), "model_type", None)
    found = []
    for task, classes in TASK_MAPPING.items():
        names: Any = cast(Any, classes).get(model_type, ())
        if type(model).__name__ in ((names,) if isinstance(names, str) else names):
            found.append("text-generation" if task == "text2text-generation" else task)  # as the Hub names both
    return found[0] if len(found) == 1 else None


def evaluation_results(
    metrics: Mapping[str, Any],
    robustness: Iterable[Mapping[str, Any]],
    *,
    dataset: str | None,
    split: str | None,
    task: str | None,
) -> list[EvalResult]:
    """The measurements, checked. An attack's name is the `metric_config`, its parameters are the `metric_args`.

    Raises:
        CondLRError: A metric is not finite, or an attack has no name or no accuracy in [0, 1].
    """
    place: dict[str, Any] = {
        "task_type": task or "other",  # the Hub requires a task and a data set
        "dataset_type": dataset if is_hub_id(dataset) else "unknown",
        "dataset_name": dataset or "unknown",
        "dataset_split": split,
        "source_name": SOURCE["name"],
        "source_url": SOURCE["url"],
    }
    results = []
    for name, value in _given(metrics).items():
        valid = not isinstance(value, (list, dict)) and value not in ("nan", "inf", "-inf")
        rule = "a metric must be a finite number, or a text such as '20.0 ± 1.2'"
        require(valid, rule, received=f"{name}={value}", remedy="Leave out what was not measured.")
        results.append(EvalResult(metric_type=name, metric_value=value, metric_name=f"{name}{MARK}", **place))
    for parameters in map(_given, robustness):
        attack, accuracy = parameters.pop("attack", None), parameters.pop("accuracy", None)
        valid = isinstance(attack, str) and type(accuracy) in (int, float) and 0 <= accuracy <= 1
        rule = "an entry of robustness must state an attack's name and an accuracy in [0, 1]"
        remedy = "For example {'attack': 'pgd-linf', 'epsilon': 8 / 255, 'steps': 20, 'accuracy': 0.71}."
        require(valid, rule, received=f"attack={attack!r}, accuracy={accuracy!r}", remedy=remedy)
        detail = ", ".join([str(attack), *(f"{name} {shown(value)}" for name, value in parameters.items())])
        name = f"Robust accuracy, {detail}{MARK}"
        stated: Any = {"metric_config": attack, "metric_args": parameters or None} | place
        # Not `accuracy`: the Hub would rank it among clean ones.
        results.append(EvalResult(metric_type="robust_accuracy", metric_value=accuracy, metric_name=name, **stated))
    return results


def merge_results(index: list[dict[str, Any]], results: list[EvalResult], name: str) -> list[dict[str, Any]]:
    """A model index with the new results in place of those this package wrote; the user's results stay as stated."""
    for model in index:
        for group in model["results"]:
            group["metrics"] = [m for m in group["metrics"] if not str(m.get("name")).endswith(MARK)]
            if group.get("source") == SOURCE:
                del group["source"]  # another tool put the user's results into this group
        model["results"] = [group for group in model["results"] if group["metrics"]]
    if results:
        index = index or [{"name": name, "results": []}]
        index[0]["results"] += eval_results_to_model_index(name, results)[0]["results"]
    return [model for model in index if model["results"]]


def shown(value: object) -> str:
    """A number to four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drop None and convert to values for a safe YAML loader: no scalars of NumPy or torch, tuples or infinities."""
    plain = {}
    for name, value in values.items():
        value = value.tolist() if hasattr(value, "tolist") else value
        is_plain = type(value) in (bool, int, str, list, dict) or (type(value) is float and math.isfinite(value))
        if value is not None:
            plain[str(name)] = value if is_plain else str(value)
    return plain
