"""`write_model_card`: the file, its YAML header and the section of `model_card.md`; the user's own words stay."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]
from huggingface_hub import ModelCard, ModelCardData, metadata_load
from huggingface_hub.constants import REPOCARD_NAME
from torch import nn
from transformers import PreTrainedModel

from hf_condlr.checkpoints.card_origin import LICENSE_FIELDS, auto_class, base_of, is_hub_id, pipeline_tag
from hf_condlr.checkpoints.card_results import evaluation_results, merge_results, shown
from hf_condlr.errors import CondLRError, MissingExtraError, require
from hf_condlr.files import replacing
from hf_condlr.layers import ConditionReport, LowRankLayer, condition_report
from hf_condlr.linalg import obeys_bound

TEMPLATE = Path(__file__).with_name("model_card.md")
BEGIN, END = "<!-- condlr:begin -->", "<!-- condlr:end -->"
PICTURE = "condition.png"
TAGS = ["condlr", "low-rank", "robustness", "compression"]


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

    An existing card keeps its text outside the section's markers and every header field that is set. Results that this
    function wrote earlier are replaced, and tags are united. Comments in the YAML header are lost, as with every tool
    of the Hub. The file is replaced in one step, or left as it was.

    Args:
        model: A model with factored layers.
        folder: Where the model is saved, or will be.
        base_model: Hub id or local folder of the model that this one was made from. By default it is the name the model
            was loaded from, if that is a Hub id or a folder. The card does not name a folder, but the base that the
            folder's own card states. A base that the header of the existing card states comes first.
        robustness: For each attack its name (`attack`), the `accuracy` in [0, 1] that it left, and its parameters under
            names of their own, such as `epsilon`, `steps`, `restarts`, `samples`.
        metrics: What was measured without an attack, {name of the metric: value}; a value of None is left out.
        dataset: Hub id, or name, of the data that the model was trained on and measured with.
        split: Name of the split of the data that it was measured with.
        plot: Whether to draw the picture of the spectra.
        model_id: Hub id that the model will have, for the lines that load it; "your-name/<folder>" by default.
        tags: Further tags.

    Returns:
        The path of the card.

    Raises:
        CondLRError: The model has no factored layers, a measurement is not valid, or the existing card has a header
            that is not YAML, or one of the section's markers without the other.

    Example:
        >>> attack = {"attack": "pgd-linf", "epsilon": 8 / 255, "steps": 20, "accuracy": 0.71, "samples": 500}
        >>> write_model_card(model, "out", robustness=[attack], metrics={"accuracy": 0.93}, dataset="cifar10")
    """
    report = condition_report(model)
    task = pipeline_tag(model)
    results = evaluation_results(metrics or {}, robustness, dataset=dataset, split=split, task=task)
    path = Path(folder) / REPOCARD_NAME
    card, index = _read(path)
    head, tail = _around(path, card.text)
    name = (model_id or Path(folder).resolve().name).rpartition("/")[2]
    base, licence = base_of(model, base_model, stated=card.data.get("base_model"), folder=folder, model_id=model_id)
    header = {
        "base_model": base,
        "library_name": "transformers" if isinstance(model, PreTrainedModel) else None,
        "pipeline_tag": task,
        "datasets": [dataset] if dataset and is_hub_id(dataset) else None,
    }
    if not any(card.data.get(field) for field in LICENSE_FIELDS):  # the base's fields never complete the user's
        header |= licence
    for field, value in header.items():
        card.data[field] = card.data.get(field) or value
    card.data["tags"] = list(dict.fromkeys([*card.data.get("tags", []), *TAGS, *tags]))
    card.data["model-index"] = merge_results(index, results, name) or None
    path.parent.mkdir(parents=True, exist_ok=True)
    attacked = [result for result in results if result.metric_config is not None]
    section = ModelCard.from_template(
        ModelCardData(),
        str(TEMPLATE),
        title=None if re.search(r"^# ", head + tail, re.MULTILINE) else name,
        base=base,
        licence=_licence_names(licence),
        licence_link=licence.get("license_link"),
        clean=[result for result in results if result.metric_config is None],
        attacked=attacked,
        settings=dict.fromkeys(name for result in attacked for name in result.metric_args or {}),
        dataset=dataset,
        split=split,
        picture=PICTURE if plot and _draw(report, path.with_name(PICTURE)) else None,
        auto=auto_class(model) if isinstance(model, PreTrainedModel) else None,
        model_id=model_id or f"your-name/{name}",
        cell=_cell,
        number=_number,
        inf=math.inf,
        **_measurements(model, report),
    ).text
    card.text = f"{head}{section}{tail}"
    with replacing(path) as temporary:
        card.save(temporary)
    return path


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
            remedy="Mend or remove the header, or move the file away; it was left as it was.",
        ) from error
    return card, index


def _around(path: Path, text: str) -> tuple[str, str]:
    """The text before and after the section, or before and after its future place."""
    begins, ends = text.count(BEGIN), text.count(END)
    if begins == ends == 0:
        return (f"{text.rstrip()}\n\n" if text.strip() else "\n"), "\n"
    head, _, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    require(
        (begins, ends) == (1, 1) and end,
        f"the section of hf_condlr in {path} must stand between one {BEGIN} and one {END}",
        received=f"{begins} and {ends}, or in another order",
        remedy="Remove the superfluous ones, or all of them: the section is appended then. The file was left as it is.",
    )
    return head, tail


def _draw(report: ConditionReport, path: Path) -> bool:
    try:
        report.plot(path)
    except MissingExtraError:
        return False
    return True


def _measurements(model: nn.Module, report: ConditionReport) -> dict[str, Any]:
    """What the template states of the layers."""
    layers = [cast(LowRankLayer, model.get_submodule(record.name)) for record in report.layers]
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    pairs = list(zip(report.layers, layers, strict=True))
    bounded = [(record, layer) for record, layer in pairs if math.isfinite(layer.tau)]
    return {
        "model": type(model).__name__,
        "report": report,
        "size": size,
        "dense_size": size + sum((r.dense_parameters - r.parameters) * layer.U.element_size() for r, layer in pairs),
        "taus": [layer.tau for layer in layers],
        "bounded": len(bounded),
        "held": sum(obeys_bound(record.condition_number, 1 + layer.tau) for record, layer in bounded),
    }


def _licence_names(licence: Mapping[str, Any]) -> list[Any]:
    stated = licence.get("license", [])
    names = [*(stated if isinstance(stated, list) else [stated]), licence.get("license_name")]
    return [name for name in names if name]


def _cell(value: object) -> str:
    """On one line, without what would end a cell of a table, or the section."""
    return " ".join(shown(value).split()).replace("|", "\\|").replace("<!--", "&lt;!--")


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "∞"
