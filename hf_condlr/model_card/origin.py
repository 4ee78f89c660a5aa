"""Where a model comes from and what it is for: base model and licence, pipeline tag, auto class."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from torch import nn
from transformers import PreTrainedModel
from transformers.modelcard import TASK_MAPPING
from transformers.models.auto import modeling_auto

from hf_condlr.errors import CondLRError
from hf_condlr.model_card.header import LICENSE_FIELDS

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """What a model was made from; both empty where that is not known."""

    hub_id: str | None = None
    licence: dict[str, Any] = field(default_factory=dict)
    """`license`, `license_name`, `license_link` of its card, so far as stated."""


def is_hub_id(name: str) -> bool:
    """Whether `name` reads "user/name" or "name"."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def base_of(model: nn.Module, given: str | Path | None, *, folder: str | Path, model_id: str | None) -> Base:
    """The base model that was given, or else the one the model was loaded from.

    A model loaded from its own folder or repository has the base that the card there states.

    Raises:
        CondLRError: `given` is no Hub id and no folder.
    """
    name = str(given or getattr(getattr(model, "config", None), "_name_or_path", None) or "")
    if given is None and name and (name == model_id or os.path.realpath(name) == os.path.realpath(folder)):
        name = _stated_base(_card(name)) or ""
    if name and Path(name).is_dir():
        card = _card(name)
        return Base(_stated_base(card), _licence(card))
    # A relative path to a checkpoint that is gone by now would pass for "user/name".
    if is_hub_id(name) and (given is not None or not re.search(r"(^|/)checkpoint-\d+$", name)):
        return Base(name, _licence(_card(name)))
    if given is not None:
        raise CondLRError(
            "base_model must be a Hub id or a folder", received=repr(name), remedy="'google/vit-base-patch16-224', say."
        )
    return Base()


def pipeline_tag(model: nn.Module) -> str | None:
    """The Hub's name for what the model's class does; None for a class that does several things, or none."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    found = []
    for task, classes in TASK_MAPPING.items():
        names: Any = cast(Any, classes).get(model_type, ())
        if type(model).__name__ in ((names,) if isinstance(names, str) else names):
            found.append(task)
    if found == ["text2text-generation"]:  # the Hub knows it as a kind of:
        return "text-generation"
    return found[0] if len(found) == 1 else None


def auto_class(model: PreTrainedModel) -> str | None:
    """The auto class that builds the model's very class, such as AutoModelForImageClassification."""
    found = []
    for name in dir(modeling_auto):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        classes = mapping.get(type(model.config), ()) if mapping is not None else ()
        if type(model) in (classes if isinstance(classes, tuple) else (classes,)):
            found.append(name)
    return min(found, key=lambda name: (name in ("AutoModel", "AutoModelForPreTraining"), name), default=None)


def _card(name: str) -> ModelCardData | None:
    """The header of the card in a folder, in the Hub's cache, or on the Hub."""
    local = Path(name) / REPOCARD_NAME
    try:
        return ModelCard.load(local if Path(name).is_dir() else name, ignore_metadata_errors=True).data
    except Exception as error:  # offline, gated, missing, no YAML: a card can do without
        logger.info("no card of %s: %s", name, error)
        return None


def _stated_base(card: ModelCardData | None) -> str | None:
    name = card.base_model if card else None
    name = name[0] if isinstance(name, list) and len(name) == 1 else name
    return name if isinstance(name, str) and is_hub_id(name) else None


def _licence(card: ModelCardData | None) -> dict[str, Any]:
    stated = {name: getattr(card, name, None) for name in LICENSE_FIELDS}
    if not stated["license"]:
        return {}
    link = stated["license_link"]
    if link and not str(link).startswith("https://"):
        stated["license_link"] = None  # relative to the other repository
    return {name: value for name, value in stated.items() if value}
