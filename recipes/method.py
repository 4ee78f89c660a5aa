"""What becomes of a model's linear layers: dense, factored, or factored with bounded condition numbers."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import yaml
from command_line import require
from datasets import Dataset
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, TrainingArguments

from hf_condlr import AdversarialArguments, CondLRConfig, CondLRTrainingArguments, get_robust_lowrank_model, is_factored

logger = logging.getLogger(__name__)
METHODS = ("dense", "lowrank", "condlr")
COMPRESSION = 0.5  # where neither rank_ratio nor compression_ratio is given
CONVERSION = (
    *("target_modules", "exclude_modules", "rank_ratio", "compression_ratio", "rank_allocation", "rank_multiple"),
    *("init_weights", "conditioned_start", "tau"),
)  # the options that become a CondLRConfig
SHARED = {option.name for part in (TrainingArguments, AdversarialArguments) for option in fields(part)}
CONSTRAINT = [option for option in fields(CondLRTrainingArguments) if option.name not in SHARED]  # what only condlr has


@dataclass
class MethodArguments:
    """The model, and what becomes of its linear layers."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to start from, on the Hub or in a folder."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Start from a fresh model of this type (vit, bert, gpt2, ...) instead."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "What a fresh model's config changes: {hidden_size: 128, num_hidden_layers: 2}; YAML."},
    )
    method: str = field(default="condlr", metadata={"help": "dense; lowrank: U, S, V free; condlr: κ(S) ≤ 1 + tau."})
    target_modules: str = field(default="all-linear", metadata={"help": "What to convert; or a regular expression."})
    exclude_modules: str | None = field(
        default=None, metadata={"help": "What of it to leave dense: a regular expression for whole names."}
    )
    rank_ratio: float | None = field(default=None, metadata={"help": "Rank as a share of the full rank."})
    compression_ratio: float | None = field(
        default=None, metadata={"help": "Share of the converted weights removed; 0.5 if no rank_ratio is given."}
    )
    rank_allocation: str = field(
        default="uniform",
        metadata={"help": "How compression_ratio is spread: uniform, energy, or fisher for a fine-tuned model."},
    )
    rank_multiple: int = field(default=1, metadata={"help": "Round ranks from a ratio down to its multiples: 8, say."})
    init_weights: str = field(
        default="svd",
        metadata={"help": "svd, randomized_svd, activation_aware, fisher (of a fine-tuned model) or orthogonal start."},
    )
    conditioned_start: bool = field(
        default=False, metadata={"help": "Start within κ ≤ 1 + tau instead of warming up to it."}
    )
    calibration_samples: int = field(
        default=256, metadata={"help": "Training samples for activation_aware and fisher."}
    )
    tau: float = field(default=0.1, metadata={"help": "Condition numbers stay ≤ 1 + tau; inf: orthonormal U, V only."})
    teacher: str | None = field(
        default=None, metadata={"help": "Dense model of the same task to distil from; see distillation_weight."}
    )

    def __post_init__(self) -> None:
        starts = [name for name in ("model_name_or_path", "model_type") if getattr(self, name) is not None]
        require(len(starts) == 1, "one of model_name_or_path and model_type must be given", starts)
        require(self.method in METHODS, f"method must be one of {', '.join(METHODS)}", self.method)
        require(self.calibration_samples >= 1, "calibration_samples must be ≥ 1", self.calibration_samples)
        require(self.teacher is None or self.method == "condlr", "a teacher needs method condlr", self.method)
        if self.rank_ratio is None and self.compression_ratio is None:
            self.compression_ratio = COMPRESSION
        # What is given is checked now, not after the data are read.
        self.condlr_config()
        if self.model_type is not None:
            self.fresh_config()
        require(
            self.model_type or not self.config_overrides, "config_overrides needs model_type", self.config_overrides
        )

    def condlr_config(self) -> CondLRConfig:
        """How layers are factored."""
        return CondLRConfig(**{name: getattr(self, name) for name in CONVERSION})

    def fresh_config(self) -> PreTrainedConfig:
        """Of a model from scratch."""
        known = self.model_type in CONFIG_MAPPING
        require(known, "model_type must be one that transformers has", self.model_type, "vit, bert or gpt2, say.")
        changes = yaml.safe_load(self.config_overrides or "{}")
        rule = "config_overrides must be a mapping such as {hidden_size: 128}"
        require(isinstance(changes, dict), rule, self.config_overrides, "Mind the space behind each colon.")
        config_class = CONFIG_MAPPING[self.model_type]
        unknown = sorted(name for name in changes if not hasattr(config_class(), name))
        require(not unknown, f"config_overrides must be fields of {config_class.__name__}", unknown)
        return config_class(**changes)


def class_names(train: Dataset) -> dict[str, Any]:
    """What a classifier's config says of the classes of its training split."""
    names = train.features["labels"].names
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def dense_start(auto_class: Any, args: MethodArguments, changes: dict[str, Any]) -> PreTrainedModel:
    """The model as the arguments name it, before anything becomes of its layers.

    Args:
        auto_class: `AutoModelForImageClassification`, say.
        args: A checkpoint, or the type of a fresh model.
        changes: Of its config. A head of other classes than the checkpoint's is drawn anew.
    """
    if args.model_type is None:
        # In float32 whatever the file holds: parameters in bfloat16 would lose small steps, and factors refuse them.
        options = {"dtype": torch.float32, "ignore_mismatched_sizes": True}
        return auto_class.from_pretrained(args.model_name_or_path, **options, **changes)
    config = args.fresh_config()
    config.update(changes)
    return auto_class.from_config(config)


def factored(
    model: PreTrainedModel, args: MethodArguments, calibration: Callable[[], Iterable[Any]]
) -> PreTrainedModel:
    """The dense start as it is, or for the low-rank methods with its layers factored, in place.

    Args:
        model: Dense, or factored by an earlier training, which it then stays.
        args: Method, ranks and start.
        calibration: Makes the batches that start or ranks are computed from, where they depend on data.

    Raises:
        ValueError: A factored model and method dense.
    """
    if is_factored(model):
        remedy = "Choose lowrank or condlr, or make it dense: condlr densify."
        require(args.method != "dense", "method dense needs a dense model", args.model_name_or_path, remedy)
        logger.warning("%s is factored already: rank, targets and tau stay those of it", args.model_name_or_path)
        return model
    if args.method == "dense":
        return model
    config = args.condlr_config()
    return get_robust_lowrank_model(
        model, config, calibration_data=calibration() if config.needs_calibration_data else None
    )


def require_same_classes(teacher: PreTrainedModel, model: PreTrainedModel) -> None:
    """Of teacher and student, in the same order."""
    rule = f"the teacher must know the classes {', '.join(list(model.config.label2id)[:5])}, ... in this order"
    same = teacher.config.num_labels == model.config.num_labels
    require(same and teacher.config.id2label == model.config.id2label, rule, list(teacher.config.label2id)[:5])


def say_ignored(model_args: MethodArguments, training_args: CondLRTrainingArguments) -> None:
    """One file serves all methods, but nobody is to believe that an option worked that did not."""
    method = model_args.method
    if method == "condlr":
        return
    names = CONVERSION if method == "dense" else () if model_args.conditioned_start else ("tau",)
    ignored = [(model_args, option) for option in fields(MethodArguments) if option.name in names]
    ignored += [(training_args, option) for option in CONSTRAINT]
    changed = [option.name for args, option in ignored if getattr(args, option.name) != option.default]
    if model_args.rank_ratio is None and model_args.compression_ratio == COMPRESSION and "compression_ratio" in changed:
        changed.remove("compression_ratio")  # nobody gave it
    if changed:
        logger.warning("method %s takes no notice of %s", method, ", ".join(changed))
