"""The tasks by the model's class."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hf_condlr.checkpoints.card_header import pipeline_tag
from hf_condlr.compression.arguments import InputArguments
from hf_condlr.compression.classification import ImageClassification, TextClassification, TokenClassification
from hf_condlr.compression.language import LanguageModeling
from hf_condlr.compression.task import Task
from hf_condlr.robustness.evaluation.rows import class_names
from hf_condlr.scripts.checks import check

TASKS: dict[str, type[Task]] = {
    "image-classification": ImageClassification,
    "text-classification": TextClassification,
    "token-classification": TokenClassification,
    "text-generation": LanguageModeling,
}


def task_of(model: PreTrainedModel, processor: Any, args: InputArguments) -> Task:
    """The task of the model's class.

    Raises:
        ConfigError: It is another one; or an option, or the processor, does not fit it.
    """
    tag = pipeline_tag(model)
    encodes = getattr(model.config, "is_encoder_decoder", False)
    rule = "compress takes classifiers of images, texts and tokens, and causal language models"
    remedy = "Convert other models with get_robust_lowrank_model, and train and evaluate them as before."
    check(tag in TASKS and not (tag == "text-generation" and encodes), rule, type(model).__name__, remedy)
    is_one = getattr(model.config, "problem_type", None) in (None, "single_label_classification")
    has_classes = tag == "text-generation" or (is_one and len(class_names(model.config)) >= 2)
    received = f"problem_type={getattr(model.config, 'problem_type', None)}, {len(class_names(model.config))} labels"
    check(has_classes, "a classifier must predict one of several classes", received, remedy)
    return TASKS[str(tag)](model, processor, args)
