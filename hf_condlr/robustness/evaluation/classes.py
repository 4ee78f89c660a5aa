"""Classes by name: a model and a data set may list the same classes in different orders."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from datasets import ClassLabel

from hf_condlr.errors import EvaluationError, listed, require
from hf_condlr.robustness.evaluation.rows import LABELS

logger = logging.getLogger(__name__)


def match_classes(model: Any, dataset: Any, label_column: Any) -> list[int] | None:
    """The model's class number for each class number of the data set; None where the numbers agree.

    Without names on both sides, or without a common name, numbers are taken to agree.

    Raises:
        EvaluationError: Some names agree, but neither their order nor all of them.
    """
    theirs, ours = _model_names(model), _data_names(dataset, label_column)
    if not theirs or not ours or list(map(_plain, ours)) == list(map(_plain, theirs))[: len(ours)]:
        return None
    numbers = {_plain(name): i for i, name in enumerate(theirs)}
    matched = [numbers.get(_plain(name), -1) for name in ours]
    both = f"{listed(theirs)} for the model, {listed(ours)} for the data set"
    known = [(i, j) for i, j in enumerate(matched) if j >= 0]
    if all(i == j for i, j in known):  # other words for the same classes, such as neg and NEGATIVE
        logger.warning("Classes have different names, and are matched by their numbers: %s.", both)
        return None
    require(
        len(known) == len(ours) and len(set(matched)) == len(ours),
        "the classes of the model and of the data set must be the same, or in the same order",
        received=both,
        remedy="Set model.config.id2label to the classes that the model was trained on.",
        error=EvaluationError,
    )
    logger.warning("Classes are in another order, and are matched by their names: %s.", both)
    return matched


def _model_names(model: Any) -> Sequence[str]:
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    values = [str(names[i]) for i in sorted(names)] if isinstance(names, dict) else []
    return [] if all(re.fullmatch(r"LABEL_\d+", name) for name in values) else values


def _data_names(dataset: Any, label_column: Any) -> Sequence[str]:
    features = getattr(dataset, "features", None) or {}
    columns = [name for name in (label_column, *LABELS) if isinstance(features.get(name), ClassLabel)]
    return features[columns[0]].names if columns else getattr(dataset, "classes", None) or []


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", str(name)).strip().casefold()
