"""The model card of a compressed model: that of every factored model, and the table of the compression."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub.constants import REPOCARD_NAME

from hf_condlr.checkpoints.card import folded_card, write_model_card
from hf_condlr.compression.report import CompressionReport
from hf_condlr.files import replacing
from hf_condlr.layers import is_factored

BEGIN, END = "<!-- condlr-compress:begin -->", "<!-- condlr-compress:end -->"


def write_card(model: Any, folder: Path, report: CompressionReport, attacks: list[dict[str, Any]]) -> None:
    """Write `README.md`; of a folded model, whose U and S cannot be told apart, only the table."""
    path = folder / REPOCARD_NAME
    if is_factored(model):
        metrics = {report.metric: report.factored.quality}
        place = {"dataset": report.data["dataset"], "split": report.data["evaluation"]}
        write_model_card(model, folder, metrics=metrics, robustness=attacks, **place)
    elif not path.exists():
        folded_card(model, folder.resolve().name).save(path)
    text = path.read_text(encoding="utf-8")
    section = f"{BEGIN}\n## What the compression cost\n\n{report.table()}\n{END}"
    known = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    text = known.sub(lambda _: section, text) if known.search(text) else f"{text.rstrip()}\n\n{section}\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
