"""`write_model_card`: the file, its YAML header and the section of `model_card.md`; the user's own words stay."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import transformers
import yaml  # type: ignore[import-untyped]
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from huggingface_hub.constants import REPOCARD_NAME
from torch import nn

from hf_condlr.checkpoints.card_header import (
    base_model_of,
    evaluation_results,
    is_hub_id,
    merge_results,
    pipeline_tag,
    shown,
)
from hf_condlr.errors import CondLRError, MissingExtraError, require
from hf_condlr.files import replacing
from hf_condlr.layers import ConditionReport, LowRankLayer, condition_report, is_factored
from hf_condlr.linalg import obeys_bound

TEMPLATE = Path(__file__).with_name("model_card.md")
BEGIN, END = "<!-- condlr:begin -->", "<!-- condlr:end -->"
PICTURE = "condition.png"
LIBRARY = "hf_condlr"
"""What the Hub shows as the library that loads the model."""
TAGS = ["condlr", "low-rank", "robustness", "compression"]


def write_model_card(
    model: nn.Module,
    folder: str | Path,
    *,
    base_model: str | None = None,
    robustness: Iterable[Mapping[str, Any]] = (),
    metrics: Mapping[str, Any] | None = None,
    dataset: str | None = None,
    split: str | None = None,
    plot: bool = True,
    model_id: str | None = None,
    tags: Iterable[str] = (),
) -> Path:
    """Write `README.md` into `folder`, and `condition.png` next to it where matplotlib is installed.

    An existing card keeps its text outside the section's markers, and every header field that is set, except for
    results that this function wrote and tags, which are united. Comments in the YAML header are lost.

    Args:
        model: A model with factored layers.
        folder: Folder where the model is saved, or will be.
        base_model: Hub id of the model that this one was made from; by default that which it was loaded from.
        robustness: For each attack its name (`attack`), the `accuracy` in [0, 1] under it, and its parameters under
            their own names, such as `epsilon`, `steps`, `restarts`, `samples`.
        metrics: Metrics without an attack, {name of the metric: value}; a value of None is left out.
        dataset: Hub id, or name, of the data that the model was trained on and measured with.
        split: Name of the split of the data that it was measured with.
        plot: Whether to draw the picture of the spectra.
        model_id: Hub id that the model will have, for the lines that load it; "your-name/<folder>" by default.
        tags: Further tags.

    Returns:
        The path of the card.

    Raises:
        CondLRError: The model has no factored layers, `base_model` or a measurement is not valid, or the existing card
            has a header that is not YAML, or one of the section's markers without the other.

    Examples:
        >>> attack = {"attack": "pgd-linf", "epsilon": 8 / 255, "steps": 20, "accuracy": 0.71, "samples": 500}
        >>> write_model_card(model, "out", robustness=[attack], metrics={"accuracy": 0.93}, dataset="cifar10")
    """
    remedy = "A folded model has no bound to report."
    require(is_factored(model), "the model must have factored layers", received="none", remedy=remedy)
    report = condition_report(model)
    rule = "base_model must be a name on the Hub"
    remedy = "For example 'google/vit-base-patch16-224'."
    require(base_model is None or is_hub_id(base_model), rule, received=repr(base_model), remedy=remedy)
    path, task = Path(folder) / REPOCARD_NAME, pipeline_tag(model)
    results = evaluation_results(metrics or {}, robustness, dataset=dataset, split=split, task=task)
    card, index = _read(path)
    head, tail = _around(path, card.text)
    name = (model_id or Path(folder).resolve().name).rpartition("/")[2]
    if card.data.get("library_name") == "transformers":  # as Trainer writes it; alone it cannot load the model
        card.data["library_name"] = None
    for field, value in {
        "base_model": base_model or base_model_of(model, model_id),
        "library_name": LIBRARY,
        "pipeline_tag": task,
        "datasets": [dataset] if is_hub_id(dataset) else None,
    }.items():
        card.data[field] = card.data.get(field) or value
    card.data["tags"] = list(dict.fromkeys([*card.data.get("tags", []), *TAGS, *tags]))
    card.data["model-index"] = merge_results(index, results, name) or None
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = None
    if plot:
        with suppress(MissingExtraError):
            picture = report.plot(path.with_name(PICTURE)).name
    section = _section(
        model,
        report,
        title=None if re.search(r"^# ", head + tail, re.MULTILINE) else name,
        base=card.data["base_model"] if is_hub_id(card.data["base_model"]) else None,
        results=results,
        dataset=dataset,
        split=split,
        picture=picture,
        model_id=model_id or f"your-name/{name}",
    )
    card.text = f"{head}{section}{tail}"
    with replacing(path) as temporary:
        card.save(temporary)
    return path


def folded_card(model: nn.Module, model_id: str, *, tags: Iterable[str] = ()) -> ModelCard:
    """The card of a model whose factored layers are folded: no κ to report, but how to load it.

    Args:
        model: The model.
        model_id: Its name on the Hub, or that of its folder.
        tags: Further tags.
    """
    name = type(model).__name__
    header = ModelCardData(
        library_name=LIBRARY, pipeline_tag=pipeline_tag(model), tags=[*dict.fromkeys([*TAGS, *tags])]
    )
    lines = [
        f"---\n{header.to_yaml()}\n---\n",
        f"# {model_id.rpartition('/')[2]}\n",
        f"`{name}` with low-rank weights, folded for inference by hf_condlr. To load it, `pip install hf_condlr`:\n",
        "```python",
        "import hf_condlr  # transformers can load folded layers from now on",
        f"from {_module_of(model)} import {name}\n",
        f"model = {name}.from_pretrained({json.dumps(model_id)})",
        "```\n",
    ]
    return ModelCard("\n".join(lines))


def _section(model: nn.Module, report: ConditionReport, *, results: list[EvalResult], **values: Any) -> str:
    """The template with what the report and the measurements state."""
    taus = [cast(LowRankLayer, model.get_submodule(record.name)).tau for record in report.layers]
    pairs = zip(report.layers, taus, strict=True)
    held = [obeys_bound(record.condition_number, 1 + tau) for record, tau in pairs if math.isfinite(tau)]
    name = type(model).__name__
    values |= {
        "model": name,
        "loads": isinstance(model, transformers.PreTrainedModel),
        "module": _module_of(model),
        "report": report,
        "taus": taus,
        "bounded": len(held),
        "held": sum(held),
        "results": results,
        "settings": dict.fromkeys(name for result in results for name in result.metric_args or {}),
        "cell": _cell,
        "number": lambda value: f"{value:.4g}" if math.isfinite(value) else "∞",
    }
    return ModelCard.from_template(ModelCardData(), str(TEMPLATE), **values).text


def _module_of(model: nn.Module) -> str:
    """Where the model's class is imported from; a script is imported by the name of its file."""
    if hasattr(transformers, type(model).__name__):
        return "transformers"
    name = type(model).__module__
    script = getattr(sys.modules.get(name), "__file__", None)
    return Path(script or "your_module").stem if name == "__main__" else name


def _read(path: Path) -> tuple[ModelCard, list[dict[str, Any]]]:
    """The existing card, or an empty one, and its model index apart: as `EvalResult`s it would lose sources."""
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
            remedy="Correct or remove the header, or move the file away; it was left as it was.",
        ) from error
    return card, index


def _around(path: Path, text: str) -> tuple[str, str]:
    """The text before and after the section, or before and after its future place."""
    begins, ends = text.count(BEGIN), text.count(END)
    if begins == ends == 0:
        return (f"{text.rstrip()}\n\n" if text.strip() else "\n"), "\n"
    head, _, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    rule = f"the section of hf_condlr in {path} must stand between one {BEGIN} and one {END}"
    remedy = "Remove the superfluous ones, or all of them: the section is appended then. The file was left as it is."
    require((begins, ends) == (1, 1) and end, rule, received=f"{begins} and {ends}, or in another order", remedy=remedy)
    return head, tail


def _cell(value: object) -> str:
    """Text on one line, without characters that would end a cell of a table, or the section."""
    return " ".join(shown(value).split()).replace("|", "\\|").replace("<!--", "&lt;!--")
