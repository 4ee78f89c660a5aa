"""`write_model_card`: the file itself; what the user wrote around our section and into the header stays."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from torch import nn
from transformers import PreTrainedModel

from hf_condlr.diagnostics import ConditionReport, condition_report
from hf_condlr.errors import CondLRError, MissingExtraError
from hf_condlr.model_card.header import Record, merge_header, split_card
from hf_condlr.model_card.measurements import Measurements
from hf_condlr.model_card.origin import base_of, is_hub_id, pipeline_tag
from hf_condlr.model_card.section import render_section

BEGIN, END = "<!-- condlr:begin -->", "<!-- condlr:end -->"
RECORD = re.compile(r"<!-- condlr:header (\{.*\}) -->")
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
    plot: bool = True,
    model_id: str | None = None,
) -> Path:
    """Write `README.md` into `folder`, and `condition.png` beside it where matplotlib is installed.

    A card that is there already keeps its text outside our markers, and every header field but those that we wrote
    and nobody changed since. Tags are united. A file is replaced in one step, or left as it was.

    Args:
        model: A model with factored layers.
        folder: Where the model is saved, or will be.
        base_model: Hub id or local folder of what the model was made from; by default the name it was loaded from,
            where that is a Hub id or a folder. A folder is not named in the card: the base its own card states is.
        robustness: Of each attack its name (`attack`), the `accuracy` in [0, 1] that it left, and its parameters under
            names of their own, such as `epsilon`, `steps`, `restarts`, `samples`.
        metrics: What was measured without an attack, {name of the metric: value}; a value of None is left out.
        dataset: Hub id, or name, of the data that the model was trained on and measured with.
        plot: Whether to draw the picture of the spectra.
        model_id: Hub id that the model will have, for the lines that load it; "your-name/<folder>" by default.

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
    measured = Measurements.of(metrics, robustness, dataset)
    path = Path(folder) / REPOCARD_NAME
    header, text, line_end = _read(path)
    head, tail = _around(path, text, line_end)
    name = (model_id or Path(folder).resolve().name).rpartition("/")[2]
    base = base_of(model, base_model, folder=folder, model_id=model_id)
    task = pipeline_tag(model)
    results = measured.eval_results(task)
    ours = ModelCardData(
        base_model=base.hub_id,
        library_name="transformers" if isinstance(model, PreTrainedModel) else None,
        pipeline_tag=task,
        tags=TAGS,
        datasets=[dataset] if dataset and is_hub_id(dataset) else None,
        eval_results=results or None,
        model_name=name if results else None,
        **base.licence,
    ).to_dict()
    yaml, record = merge_header(header or "", ours, _record(text))
    path.parent.mkdir(parents=True, exist_ok=True)
    section = render_section(
        model,
        report,
        title=None if re.search(r"^# ", head + tail, re.MULTILINE) else name,
        base=base,
        measured=measured,
        model_id=model_id or f"your-name/{name}",
        picture=PICTURE if plot and _plot(report, path.with_name(PICTURE)) else None,
    )
    ours_text = f"{BEGIN}\n<!-- condlr:header {json.dumps(record)} -->\n{section}\n{END}"
    fenced = f"---\n{yaml}\n---\n" + ("\n" if header is None else "")
    card = fenced.replace("\n", line_end) + head + ours_text.replace("\n", line_end) + tail
    _replace(path, lambda temporary: temporary.write_bytes(card.encode()))
    return path


def _read(path: Path) -> tuple[str | None, str, str]:
    """Header or None, text, and the line ending of the card that is there; an empty one where none is."""
    if not path.exists():
        return None, "", "\n"
    try:
        content = path.read_bytes().decode("utf-8-sig")
        header, text = split_card(content)
    except ValueError as error:  # UnicodeDecodeError is one
        raise CondLRError(
            f"the header of {path} must be YAML between two lines ---, as the Hub reads it",
            received=str(error),
            remedy="Mend or remove the header, or move the file away; it was left as it is.",
        ) from error
    return None if header is None else header.replace("\r\n", "\n"), text, "\r\n" if "\r\n" in content else "\n"


def _around(path: Path, text: str, line_end: str) -> tuple[str, str]:
    """What stands before and after our section, or will."""
    begins, ends = text.count(BEGIN), text.count(END)
    if begins == ends == 0:
        gap = "" if not text else line_end if text.endswith("\n") else 2 * line_end
        return text + gap, line_end
    head, _, rest = text.partition(BEGIN)
    _, found, tail = rest.partition(END)
    if (begins, ends) != (1, 1) or not found:
        raise CondLRError(
            f"our section of {path} must stand between one {BEGIN} and one {END}",
            received=f"{begins} and {ends}, or in another order",
            remedy="Remove what is too much, or all of them: the section is appended then. The file was left as it is.",
        )
    return head, tail


def _record(text: str) -> Record:
    """What `merge_header` returned last time; without it everything in the header is the user's."""
    match = RECORD.search(text)
    try:
        return dict(json.loads(match.group(1))) if match else {}
    except ValueError:
        return {}


def _plot(report: ConditionReport, path: Path) -> bool:
    """Whether there is a picture now."""
    try:
        _replace(path, report.plot)
    except MissingExtraError:
        return False
    return True


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put it in its place in one step."""
    temporary = path.with_name(f".{os.getpid()}-{path.name}")  # same ending: it chooses the picture's format
    try:
        write(temporary)
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
