"""Measurements in a model card, as the entries of the model index in its header."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from hf_condlr.checkpoints.card_origin import is_hub_id
from hf_condlr.errors import require

SOURCE = {"url": "https://arxiv.org/abs/2306.01485", "name": "hf_condlr"}
MARK = " (hf_condlr)"
"""Ends the names of this package's results: huggingface_hub groups results of one data set, also of several sources."""


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
        "dataset_type": dataset if dataset and is_hub_id(dataset) else "unknown",
        "dataset_name": dataset or "unknown",
        "dataset_split": split,
        "source_name": SOURCE["name"],
        "source_url": SOURCE["url"],
    }
    results = []
    for name, value in _given(metrics).items():
        require(
            not isinstance(value, (list, dict)) and value not in ("nan", "inf", "-inf"),
            "a metric must be a finite number, or a text such as '20.0 ± 1.2'",
            received=f"{name}={value}",
            remedy="Leave out what was not measured.",
        )
        results.append(EvalResult(metric_type=name, metric_value=value, metric_name=f"{name}{MARK}", **place))
    for parameters in map(_given, robustness):
        attack, accuracy = parameters.pop("attack", None), parameters.pop("accuracy", None)
        require(
            isinstance(attack, str) and type(accuracy) in (int, float) and 0 <= accuracy <= 1,
            "an entry of robustness must state an attack's name and an accuracy in [0, 1]",
            received=f"attack={attack!r}, accuracy={accuracy!r}",
            remedy="Write {'attack': 'pgd-linf', 'epsilon': 8 / 255, 'steps': 20, 'accuracy': 0.71}, say.",
        )
        detail = ", ".join([str(attack), *(f"{name} {shown(value)}" for name, value in parameters.items())])
        results.append(
            EvalResult(
                metric_type="robust_accuracy",  # not `accuracy`: the Hub would rank it among clean ones
                metric_value=accuracy,
                metric_name=f"Robust accuracy, {detail}{MARK}",
                metric_config=attack,
                metric_args=parameters or None,
                **place,
            )
        )
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
    return {str(name): _plain(value) for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    """As a safe YAML loader can read it: no scalars of NumPy or torch, no tuples, no infinities."""
    value = value.tolist() if hasattr(value, "tolist") else value
    is_plain = type(value) in (bool, int, str, list, dict) or (type(value) is float and math.isfinite(value))
    return value if is_plain else str(value)
