"""The text of our section of the card, from `templates/model_card.md`.

By `string.Template`: `ModelCard.from_template` would need jinja2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from hf_condlr.diagnostics import ConditionReport
from hf_condlr.layers import LowRankLayer
from hf_condlr.model_card.measurements import Measurements, shown
from hf_condlr.model_card.origin import Base, auto_class

LONGEST_OPEN_TABLE = 12


def render_section(
    model: nn.Module,
    report: ConditionReport,
    *,
    title: str | None,
    base: Base,
    measured: Measurements,
    model_id: str,
    picture: str | None,
) -> str:
    """Markdown without the markers around it.

    Args:
        model: What is described.
        report: Its condition.
        title: The heading of the page; None where the user has one.
        base: What the model was made from.
        measured: Goes into tables.
        model_id: For the lines that load the model.
        picture: Name of the picture's file.
    """
    template = Template((files("hf_condlr") / "templates" / "model_card.md").read_text(encoding="utf-8"))
    text = template.substitute(
        _sizes(model, report),
        title=f"# {title}" if title else "",
        summary=_summary(model, report, base),
        tau=_tau(model, report),
        attacked=_ATTACKED if measured.attacks else _NOT_ATTACKED,
        max_kappa=_number(report.max_condition_number),
        mean_kappa=_number(report.mean_condition_number),
        orthonormality=f"{report.max_orthonormality_error:.1e}",
        layers=_layers(report),
        picture=f"![singular values and condition number of each layer]({picture})" if picture else "",
        measured=_measured(measured),
        usage=_usage(model, model_id),
        licence=_licence(base),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip()  # parts that this card has not leave blank lines


_ATTACKED = "What attacks left of the accuracy is measured below."
_NOT_ATTACKED = "No attack on this model is reported here: measure its robustness by attacking it."


def _summary(model: nn.Module, report: ConditionReport, base: Base) -> str:
    origin = f", made from {_link(base.hub_id)}" if base.hub_id else ""
    return (
        f"`{type(model).__name__}` with low-rank weights{origin}: {len(report.layers)} of its layers are factored by "
        f"hf_condlr, and it has {report.parameters:,} parameters instead of {report.dense_parameters:,}."
    )


def _tau(model: nn.Module, report: ConditionReport) -> str:
    """τ, and in how many layers it is kept to."""
    taus = {record.name: cast(LowRankLayer, model.get_submodule(record.name)).tau for record in report.layers}
    bounded = [record for record in report.layers if math.isfinite(taus[record.name])]
    if not bounded:
        return "Here τ = ∞: the cores are not constrained."
    values = sorted(set(taus.values()))
    rule = f"κ ≤ 1 + τ = {1 + values[0]:g}" if len(values) == 1 else "κ ≤ 1 + τ"
    held = sum(record.condition_number <= (1 + taus[record.name]) * (1 + 1e-4) for record in bounded)
    which = "" if len(bounded) == len(report.layers) else " whose τ is finite"
    stated = " or ".join(_number(tau, "g") for tau in values)
    return f"Here τ = {stated}, and {rule} holds for {held} of the {len(bounded)} factored layers{which}."


def _sizes(model: nn.Module, report: ConditionReport) -> dict[str, str]:
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    dense = size
    for record in report.layers:
        layer = cast(LowRankLayer, model.get_submodule(record.name))
        dense += (record.dense_parameters - record.parameters) * layer.U.element_size()
    return {
        "parameters": f"{report.parameters:,}",
        "dense_parameters": f"{report.dense_parameters:,}",
        "parameters_removed": f"{report.compression:.1%}",
        "bytes": f"{size:,}",
        "dense_bytes": f"{dense:,}",
        "bytes_removed": f"{1 - size / dense:.1%}",
    }


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


def _measured(measured: Measurements) -> str:
    if not (measured.metrics or measured.attacks):
        return ""
    parts = ["## Measured"]
    if measured.dataset:
        parts.append(f"On {_cell(measured.dataset)}.")
    if measured.metrics:
        rows = [(name, shown(value)) for name, value in measured.metrics.items()]
        parts.append(_table(("metric", "value"), rows))
    if measured.attacks:
        names = list(dict.fromkeys(name for attack in measured.attacks for name in attack.parameters))
        attacked = [
            (attack.name, *(shown(attack.parameters.get(name, "")) for name in names), shown(attack.accuracy))
            for attack in measured.attacks
        ]
        parts.append(_table(("attack", *names, "robust accuracy"), attacked))
    return "\n\n".join(parts)


def _usage(model: nn.Module, model_id: str) -> str:
    if not isinstance(model, PreTrainedModel):
        return ""  # there is no from_pretrained to show
    auto = auto_class(model)
    name, module = (auto, "transformers") if auto else (type(model).__name__, type(model).__module__)
    return (
        "## Use\n\n```sh\npip install hf_condlr\n```\n\n```python\n"
        "import hf_condlr  # transformers can load factored layers from now on\n"
        f'from {module} import {name}\n\nmodel = {name}.from_pretrained("{model_id}")\n```'
    )


def _licence(base: Base) -> str:
    if base.licence:
        of = f"The base model {_link(base.hub_id)}" if base.hub_id else "The model that this one was made from"
        stated = base.licence["license"]
        names = [*(stated if isinstance(stated, list) else [stated]), base.licence.get("license_name")]
        link = base.licence.get("license_link")
        see = f" See {_cell(link)}." if link else ""
        named = ", ".join(f"`{_cell(name)}`" for name in names if name)
        return f"## Licence\n\n{of} is published under {named}.{see}"
    return f"## Licence\n\nFor the licence of the base model see {_link(base.hub_id)}." if base.hub_id else ""


def _link(hub_id: str) -> str:
    return f"[{hub_id}](https://huggingface.co/{hub_id})"


def _number(value: float, digits: str = ".4g") -> str:
    return format(value, digits) if math.isfinite(value) else "∞"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: object) -> str:
    """One line, without what would end the cell, or our section."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<!--", "&lt;!--")
