"""`write_model_card`: the file, its YAML header and our section; what the user wrote into either stays."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.repocard_data import eval_results_to_model_index
from torch import nn
from transformers import PreTrainedModel

from hf_condlr.checkpoints.card_origin import LICENSE_FIELDS, base_of, is_hub_id, pipeline_tag
from hf_condlr.checkpoints.card_section import render_section, shown
from hf_condlr.errors import CondLRError, MissingExtraError
from hf_condlr.files import replacing
from hf_condlr.layers import condition_report

BEGIN, END = "<!-- condlr:begin -->", "<!-- condlr:end -->"


PICTURE = "condition.png"


TAGS = ["condlr", "low-rank", "robustness", "compression"]


SOURCE = {"url": "https://arxiv.org/abs/2306.01485", "name": "hf_condlr"}


MARK = " (hf_condlr)"


"""Ends the names of our results: huggingface_hub puts results of one data set together, whatever their sources."""


def write_model_card(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str | Path | None = None,
    robustness: Iterable[Mapping[str, Any]] = (),
    metrics: Mapping[str, Any] | None = None,
    dataset: str | None = None,
    split: str | None = None,
    plot: bool = True,
    model_id: str | None = None,
    tags: Iterable[str] = (),
) -> Path:
    """Write `README.md` into `folder`, and `condition.png` beside it where matplotlib is installed.

    A card that is there already keeps its text outside our markers and every header field that is set; results that
    we wrote are replaced, tags united. Comments in the YAML are lost, as with every tool of the Hub. The file is
    replaced in one step, or left as it was.

    Args:
        model: A model with factored layers.
        folder: Where the model is saved, or will be.
        base_model: Hub id or local folder of what the model was made from; by default the name it was loaded from,
            where that is a Hub id or a folder. A folder is not named in the card: the base its own card states is.
            One that the header of the card states already comes first.
        robustness: Of each attack its name (`attack`), the `accuracy` in [0, 1] that it left, and its parameters under
            names of their own, such as `epsilon`, `steps`, `restarts`, `samples`.
        metrics: What was measured without an attack, {name of the metric: value}; a value of None is left out.
        dataset: Hub id, or name, of the data that the model was trained on and measured with.
        split: Name of the split of the data that it was measured with.
        plot: Whether to draw the picture of the spectra.
        model_id: Hub id that the model will have, for the lines that load it; "your-name/<folder>" by default.
        tags: Besides ours.

    Returns:
        The path of the card.

    Raises:
        CondLRError: The model has no factored layers, a measurement is none, or the card that is there has a header
            that is no YAML, or one of our markers without the other.

    Example:
        >>> attack = {"attack": "pgd-linf", "epsilon": 8 / 255, "steps": 20, "accuracy": 0.71, "samples": 500}
        >>> write_model_card(model, "out", robustness=[attack], metrics={"accuracy": 0.93}, dataset="cifar10")
    """
    report = condition_report(model)
    task = pipeline_tag(model)
    results = _eval_results(metrics or {}, robustness, dataset, split, task)
    path = Path(folder) / REPOCARD_NAME
    card, index = _read(path)
    head, tail = _around(path, card.text)
    name = (model_id or Path(folder).resolve().name).rpartition("/")[2]
    base = base_of(model, base_model, stated=card.data.get("base_model"), folder=folder, model_id=model_id)
    ours = {
        "base_model": base.hub_id,
        "library_name": "transformers" if isinstance(model, PreTrainedModel) else None,
        "pipeline_tag": task,
        "datasets": [dataset] if dataset and is_hub_id(dataset) else None,
    }
    if not any(card.data.get(field) for field in LICENSE_FIELDS):  # ours never complete the user's
        ours |= base.licence
    for field, value in ours.items():
        card.data[field] = card.data.get(field) or value
    card.data["tags"] = list(dict.fromkeys([*card.data.get("tags", []), *TAGS, *tags]))
    card.data["model-index"] = _merge_results(index, results, name) or None
    path.parent.mkdir(parents=True, exist_ok=True)
    if plot:
        try:
            report.plot(path.with_name(PICTURE))
        except MissingExtraError:
            plot = False
    section = render_section(
        model,
        report,
        title=None if re.search(r"^# ", head + tail, re.MULTILINE) else name,
        base=base,
        results=results,
        dataset=dataset,
        split=split,
        model_id=model_id or f"your-name/{name}",
        picture=PICTURE if plot else None,
    )
    card.text = f"{head}{BEGIN}\n{section}\n{END}{tail}"
    with replacing(path) as temporary:
        card.save(temporary)
    return path


def _read(path: Path) -> tuple[ModelCard, list[dict[str, Any]]]:
    """The card that is there, or an empty one, and its model index apart: as `EvalResult`s it would lose sources."""
    try:
        content = path.read_text(encoding="utf-8-sig") if path.exists() else ""
        if not content.lstrip().startswith("---"):
            return ModelCard(f"---\n\n---\n\n{content}"), []
        card = ModelCard(content)  # checks the index, too
        if card.text == content:
            raise ValueError("it opens with --- and no second line --- closes it")
        header = metadata_load(path) or {}
        index = header.pop("model-index", None) or []
        card.data = ModelCardData(**header)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CondLRError(
            f"the header of {path} must be YAML between two lines ---, as the Hub reads it",
            received=" ".join(str(error).split()),
            remedy="Mend or remove the header, or move the file away; it was left as it is.",
        ) from error
    return card, index


def _around(path: Path, text: str) -> tuple[str, str]:
    """What stands before and after our section, or will."""
    begins, ends = text.count(BEGIN), text.count(END)
    if begins == ends == 0:
        return (f"{text.rstrip()}\n\n" if text.strip() else "\n"), "\n"
    head, _, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if (begins, ends) != (1, 1) or not end:
        raise CondLRError(
            f"our section of {path} must stand between one {BEGIN} and one {END}",
            received=f"{begins} and {ends}, or in another order",
            remedy="Remove what is too much, or all of them: the section is appended then. The file was left as it is.",
        )
    return head, tail


def _eval_results(
    metrics: Mapping[str, Any],
    robustness: Iterable[Mapping[str, Any]],
    dataset: str | None,
    split: str | None,
    task: str | None,
) -> list[EvalResult]:
    """What was measured, checked; an attack's name is the `metric_config`, its parameters are the `metric_args`."""
    place: dict[str, Any] = {
        "task_type": task or "other",  # the Hub requires a task and a data set
        "dataset_type": dataset if dataset and is_hub_id(dataset) else "unknown",
        "dataset_name": dataset or "unknown",
        "dataset_split": split,
        "source_name": SOURCE["name"],
        "source_url": SOURCE["url"],
    }
    results = []
    for name, value in _stated(metrics).items():
        if isinstance(value, (list, dict)) or value in ("nan", "inf", "-inf"):
            raise CondLRError(
                "a metric must be a finite number, or a text such as '20.0 ± 1.2'",
                received=f"{name}={value}",
                remedy="Leave out what was not measured.",
            )
        results.append(EvalResult(metric_type=name, metric_value=value, metric_name=f"{name}{MARK}", **place))
    for parameters in map(_stated, robustness):
        attack, accuracy = parameters.pop("attack", None), parameters.pop("accuracy", None)
        if not isinstance(attack, str) or type(accuracy) not in (int, float) or not 0 <= accuracy <= 1:
            raise CondLRError(
                "an entry of robustness must state an attack's name and an accuracy in [0, 1]",
                received=f"attack={attack!r}, accuracy={accuracy!r}",
                remedy="Write {'attack': 'pgd-linf', 'epsilon': 8 / 255, 'steps': 20, 'accuracy': 0.71}, say.",
            )
        detail = ", ".join([attack, *(f"{name} {shown(value)}" for name, value in parameters.items())])
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


def _stated(values: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): _plain(value) for name, value in values.items() if value is not None}


def _plain(value: Any) -> Any:
    """As a safe YAML loader can read it: no scalars of NumPy or torch, no tuples, no infinities."""
    value = value.tolist() if hasattr(value, "tolist") else value
    is_plain = type(value) in (bool, int, str, list, dict) or (type(value) is float and math.isfinite(value))
    return value if is_plain else str(value)


def _merge_results(index: list[dict[str, Any]], results: list[EvalResult], name: str) -> list[dict[str, Any]]:
    """Our earlier results out of a model index, the new ones in; the user's stay as stated."""
    for model in index:
        for group in model["results"]:
            group["metrics"] = [m for m in group["metrics"] if not str(m.get("name")).endswith(MARK)]
            if group.get("source") == SOURCE:
                del group["source"]  # another tool put the user's results into our group
        model["results"] = [group for group in model["results"] if group["metrics"]]
    if results:
        index = index or [{"name": name, "results": []}]
        index[0]["results"] += eval_results_to_model_index(name, results)[0]["results"]
    return [model for model in index if model["results"]]
