"""The text of our section of the card, from `templates/model_card.md`, by `string.Template`: no jinja2."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any, cast

from huggingface_hub import EvalResult
from torch import nn
from transformers import PreTrainedModel

from hf_condlr.checkpoints.card_origin import Base, auto_class
from hf_condlr.layers import ConditionReport, LowRankLayer
from hf_condlr.linalg import obeys_bound

LONGEST_OPEN_TABLE = 12


def render_section(
    model: nn.Module,
    report: ConditionReport,
    *,
    title: str | None,
    base: Base,
    results: Sequence[EvalResult],
    dataset: str | None,
    split: str | None,
    model_id: str,
    picture: str | None,
) -> str:
    """Markdown without the markers around it; `title` is None where the user has one."""
    layers = {record.name: cast(LowRankLayer, model.get_submodule(record.name)) for record in report.layers}
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    dense = size + sum((r.dense_parameters - r.parameters) * layers[r.name].U.element_size() for r in report.layers)
    text = Template((files("hf_condlr") / "templates" / "model_card.md").read_text(encoding="utf-8")).substitute(
        title=f"# {title}" if title else "",
        model=type(model).__name__,
        origin=f", made from {_link(base.hub_id)}" if base.hub_id else "",
        count=len(layers),
        tau=_tau(report, {name: layer.tau for name, layer in layers.items()}),
        attacked="What attacks left of the accuracy is measured below."
        if any(result.metric_config is not None for result in results)
        else "No attack on this model is reported here: measure its robustness by attacking it.",
        parameters=f"{report.parameters:,}",
        dense_parameters=f"{report.dense_parameters:,}",
        parameters_removed=f"{report.compression:.1%}",
        bytes=f"{size:,}",
        dense_bytes=f"{dense:,}",
        bytes_removed=f"{1 - size / dense:.1%}",
        max_kappa=_number(report.max_condition_number),
        mean_kappa=_number(report.mean_condition_number),
        orthonormality=f"{report.max_orthonormality_error:.1e}",
        layers=_layers(report),
        picture=f"![singular values and condition number of each layer]({picture})" if picture else "",
        measured=_measured(results, dataset, split),
        usage=_usage(model, model_id) if isinstance(model, PreTrainedModel) else "",
        licence=_licence(base),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()  # parts that this card has not leave blank lines


def shown(value: Any) -> str:
    """A number to four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tau(report: ConditionReport, taus: dict[str, float]) -> str:
    """τ, and in how many layers it is kept to."""
    bounded = [record for record in report.layers if math.isfinite(taus[record.name])]
    if not bounded:
        return "Here τ = ∞: the cores are not constrained."
    values = sorted(set(taus.values()))
    rule = "κ ≤ 1 + τ" + (f" = {1 + values[0]:g}" if len(values) == 1 else "")
    held = sum(obeys_bound(record.condition_number, 1 + taus[record.name]) for record in bounded)
    which = "" if len(bounded) == len(report.layers) else " whose τ is finite"
    stated = " or ".join(map(_number, values))
    return f"Here τ = {stated}, and {rule} holds for {held} of the {len(bounded)} factored layers{which}."


def _layers(report: ConditionReport) -> str:
    rows = [
        (
            f"`{layer.name}`",
            f"{layer.shape[0]} × {layer.shape[1]}",
            layer.r,
            _number(layer.condition_number),
            _number(layer.bound) if math.isfinite(layer.bound) else "none",
            f"{layer.parameters:,}",
            f"{layer.parameters / layer.dense_parameters:.1%}",
        )
        for layer in report.layers
    ]
    table = _table(("layer", "out × in", "rank", "κ", "bound on κ", "parameters", "of dense"), rows)
    if len(rows) <= LONGEST_OPEN_TABLE:
        return table
    return f"<details>\n<summary>All {len(rows)} layers</summary>\n\n{table}\n\n</details>"


def _measured(results: Sequence[EvalResult], dataset: str | None, split: str | None) -> str:
    clean = [(r.metric_type, shown(r.metric_value)) for r in results if r.metric_config is None]
    attacks = [r for r in results if r.metric_config is not None]
    names = list(dict.fromkeys(name for r in attacks for name in r.metric_args or {}))
    attacked = [
        (r.metric_config, *(shown((r.metric_args or {}).get(name, "")) for name in names), shown(r.metric_value))
        for r in attacks
    ]
    place = " of ".join(text for text in (split and f"the {split} split", dataset) if text)
    parts = [
        "## Measured" if results else "",
        f"On {_cell(place)}." if results and place else "",
        _table(("metric", "value"), clean) if clean else "",
        _table(("attack", *names, "robust accuracy"), attacked) if attacked else "",
    ]
    return "\n\n".join(parts)


def _usage(model: PreTrainedModel, model_id: str) -> str:
    auto = auto_class(model)
    name, module = (auto, "transformers") if auto else (type(model).__name__, type(model).__module__)
    return (
        "## Use\n\n```sh\npip install hf_condlr\n```\n\n```python\n"
        "import hf_condlr  # transformers can load factored layers from now on\n"
        f'from {module} import {name}\n\nmodel = {name}.from_pretrained("{model_id}")\n```'
    )


def _licence(base: Base) -> str:
    if not base.licence:
        return f"## Licence\n\nFor the licence of the base model see {_link(base.hub_id)}." if base.hub_id else ""
    stated = base.licence["license"]
    names = [*(stated if isinstance(stated, list) else [stated]), base.licence.get("license_name")]
    named = ", ".join(f"`{_cell(name)}`" for name in names if name)
    link = base.licence.get("license_link")
    return f"## Licence\n\nThe base model is published under {named}." + (f" See {_cell(link)}." if link else "")


def _link(hub_id: str) -> str:
    return f"[{hub_id}](https://huggingface.co/{hub_id})"


def _number(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "∞"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: object) -> str:
    """One line, without what would end the cell, or our section."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<!--", "&lt;!--")
