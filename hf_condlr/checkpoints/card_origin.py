"""Where a model comes from and what it is for: base model and licence, pipeline tag, auto class."""

from __future__ import annotations

import logging
import os
import re
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

from hf_condlr.errors import require

logger = logging.getLogger(__name__)

LICENSE_FIELDS = ("license", "license_name", "license_link")


def is_hub_id(name: object) -> bool:
    """Whether `name` reads "user/name" or "name"."""
    try:
        validate_repo_id(cast(str, name))
    except HFValidationError:
        return False
    return True


def base_of(
    model: nn.Module, given: str | Path | None, *, stated: Any, folder: str | Path, model_id: str | None
) -> tuple[str | None, dict[str, Any]]:
    """The base model's Hub id, None where it is not known, and its `LICENSE_FIELDS`, as far as its card states them.

    The header of the model's own card (`stated`) comes first, then what was `given`, then what the model was loaded
    from.

    Raises:
        CondLRError: `given` is neither a Hub id nor a folder.
    """
    name = str(given or getattr(getattr(model, "config", None), "_name_or_path", None) or "")
    if given is None and (name == model_id or os.path.realpath(name) == os.path.realpath(folder)):
        name = ""  # the model itself: only its card knows the base
    base, card = None, None
    if name and Path(name).is_dir():
        card = _card(name)
        base = _hub_id(card.base_model) if card else None
    # A relative path to a checkpoint that was removed would pass for "user/name".
    elif is_hub_id(name) and (given or not re.search(r"(^|/)checkpoint-\d+$", name)):
        base, card = name, _card(name)
    else:
        require(
            not given,
            "base_model must be a Hub id or a folder",
            received=repr(name),
            remedy="'google/vit-base-patch16-224', say.",
        )
    first = _hub_id(stated)
    if first not in (None, base):
        base, card = first, _card(str(first))
    return base, _licence(card)


def pipeline_tag(model: nn.Module) -> str | None:
    """The Hub's name for what the model's class does; None for a class with several tasks, or none."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    found = []
    for task, classes in TASK_MAPPING.items():
        names: Any = cast(Any, classes).get(model_type, ())
        if type(model).__name__ in ((names,) if isinstance(names, str) else names):
            found.append("text-generation" if task == "text2text-generation" else task)  # the Hub's kind of it
    return found[0] if len(found) == 1 else None


def auto_class(model: PreTrainedModel) -> tuple[str, str]:
    """Module and name of the auto class that builds the model's very class; those of the class where none does."""
    found = []
    for name in dir(modeling_auto):
        mapping = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        classes = mapping.get(type(model.config), ()) if mapping is not None else ()
        if type(model) in (classes if isinstance(classes, tuple) else (classes,)):
            found.append(name)
    if not found:
        return type(model).__module__, type(model).__name__
    return "transformers", min(found, key=lambda name: (name in ("AutoModel", "AutoModelForPreTraining"), name))


def _card(name: str) -> ModelCardData | None:
    """The header of the card in a folder, in the Hub's cache, or on the Hub."""
    try:
        path = Path(name) / REPOCARD_NAME
        return ModelCard.load(path if Path(name).is_dir() else name, ignore_metadata_errors=True).data
    except Exception as error:  # offline, gated, missing, no YAML: a card can do without
        logger.info("no card of %s: %s", name, error)
        return None


def _hub_id(stated: Any) -> str | None:
    stated = stated[0] if isinstance(stated, list) and len(stated) == 1 else stated
    return stated if isinstance(stated, str) and is_hub_id(stated) else None


def _licence(card: ModelCardData | None) -> dict[str, Any]:
    stated = {name: card.get(name) for name in LICENSE_FIELDS} if card and card.license else {}
    if not str(stated.get("license_link")).startswith("https://"):
        stated.pop("license_link", None)  # relative to the other repository
    return {name: value for name, value in stated.items() if value}
