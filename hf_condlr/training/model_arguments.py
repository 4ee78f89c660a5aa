"""`ModelArguments`: the options of a training script that choose its model and make a `CondLRConfig`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel, TrainingArguments

from hf_condlr.config import CondLRConfig
from hf_condlr.errors import ConfigError, require
from hf_condlr.layers import factored_layers
from hf_condlr.training.arguments import AdversarialArguments, CondLRTrainingArguments

logger = logging.getLogger(__name__)
METHODS = ("dense", "lowrank", "condlr")
COMPRESSION = 0.5
CONVERSION = (
    *("target_modules", "exclude_modules", "rank_ratio", "compression_ratio", "rank_allocation", "rank_multiple"),
    *("init_weights", "conditioned_start", "tau"),
)


@dataclass
class ModelArguments:
    """Model: which one, and what becomes of its linear layers."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to start from, on the Hub or in a folder, dense or factored."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Start from random weights of this architecture instead: vit, bert, gpt2, ..."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes of that architecture's config, as YAML: '{hidden_size: 128, image_size: 32}'."},
    )
    method: str = field(
        default="condlr",
        metadata={"help": "dense; lowrank: W = U S Vᵀ without a constraint; condlr: U, V orthonormal, κ(S) ≤ 1 + tau."},
    )
    target_modules: str = field(default="all-linear", metadata={"help": "Layers to factor, or a regular expression."})
    exclude_modules: str | None = field(
        default=None, metadata={"help": "Layers of those to leave dense: a regular expression for whole names."}
    )
    rank_ratio: float | None = field(default=None, metadata={"help": "Rank as a share of the full rank, in (0, 1]."})
    compression_ratio: float | None = field(
        default=None,
        metadata={"help": f"Share of the factored layers' weights to remove; {COMPRESSION} without a rank_ratio."},
    )
    rank_allocation: str = field(
        default="uniform",
        metadata={
            "help": "How compression_ratio is spread over layers: uniform, energy, or fisher (fine-tuned model)."
        },
    )
    rank_multiple: int = field(default=1, metadata={"help": "Round ranks down to multiples; GPUs multiply 8 faster."})
    init_weights: str = field(
        default="svd", metadata={"help": "svd, randomized_svd, activation_aware, fisher (fine-tuned) or orthogonal."}
    )
    conditioned_start: bool = field(
        default=False, metadata={"help": "Start within κ ≤ 1 + tau instead of lowering κ in a warm-up."}
    )
    tau: float = field(default=0.1, metadata={"help": "κ(S) ≤ 1 + tau; inf: only orthonormal U and V."})
    teacher: str | None = field(
        default=None, metadata={"help": "Dense model of the same task to distil from; needs distillation_weight."}
    )

    def __post_init__(self) -> None:
        given = [name for name in ("model_name_or_path", "model_type") if getattr(self, name) is not None]
        _check(len(given) == 1, "exactly one of model_name_or_path and model_type must be given", given, "Choose one.")
        _check(self.method in METHODS, f"method must be one of {', '.join(METHODS)}", repr(self.method), "Choose one.")
        distils = self.teacher is None or self.method == "condlr"
        _check(distils, "a teacher needs method condlr", repr(self.method), "Leave the teacher out.")
        fresh = self.model_type is not None or not self.config_overrides
        _check(fresh, "config_overrides needs model_type", self.config_overrides, "A pretrained model has its config.")
        if self.rank_ratio is None and self.compression_ratio is None:
            self.compression_ratio = COMPRESSION
        self.condlr_config()  # checks the values
        if self.model_type is not None:
            self.config()

    def condlr_config(self) -> CondLRConfig:
        """How layers are factored."""
        return CondLRConfig(**{name: getattr(self, name) for name in CONVERSION})

    def config(self, auto_class: Any = None) -> PreTrainedConfig:
        """The model's config, from its checkpoint or from `model_type` and `config_overrides`.

        Args:
            auto_class: `AutoModelForImageClassification`, say: models that it does not have are refused.

        Raises:
            ConfigError: There is no such architecture or field, or the architecture is not for this task.
        """
        config = self._fresh_config() if self.model_type else AutoConfig.from_pretrained(str(self.model_name_or_path))
        _check(
            auto_class is None or type(config) in auto_class._model_mapping,
            f"the model must be one for {getattr(auto_class, '__name__', '')}",
            repr(config.model_type),
            "Choose another model, or the script for its task.",
        )
        return config

    def _fresh_config(self) -> PreTrainedConfig:
        known, changes = self.model_type in CONFIG_MAPPING, yaml.safe_load(self.config_overrides or "{}")
        _check(known, "model_type must be one that transformers has", repr(self.model_type), "vit, bert, gpt2, say.")
        rule, remedy = "config_overrides must be a mapping", "{hidden_size: 128}, say; mind the space after a colon."
        _check(isinstance(changes, dict), rule, repr(self.config_overrides), remedy)
        config_class = CONFIG_MAPPING[str(self.model_type)]
        unknown = [name for name in changes if not hasattr(config_class(), name)]
        rule = f"config_overrides must be fields of {config_class.__name__}"
        _check(not unknown, rule, ", ".join(unknown), "Mind the space after each colon.")
        config = config_class(**changes)
        config.architectures = []  # None would break auto classes with a choice of models (DeiT)
        return config

    def load_model(self, auto_class: Any, **changes: Any) -> PreTrainedModel:
        """The model before its layers are factored, in float32: in bfloat16 small updates would be lost.

        Args:
            auto_class: `AutoModelForImageClassification`, say.
            changes: Of the model's config. A head for other classes than the checkpoint's starts from random weights.
        """
        if self.model_type is None:
            options = {"dtype": torch.float32, "ignore_mismatched_sizes": True}
            return auto_class.from_pretrained(self.model_name_or_path, **options, **changes)
        config = self._fresh_config()
        config.update(changes)
        return auto_class.from_config(config)

    def converts(self, model: PreTrainedModel) -> bool:
        """Whether the layers of this model are still to be factored.

        Raises:
            ConfigError: It is factored already, and the method is dense.
        """
        if not factored_layers(model):
            return self.method != "dense"
        remedy = "Choose lowrank or condlr, or make it dense: condlr densify."
        _check(self.method != "dense", "method dense needs a dense model", self.model_name_or_path, remedy)
        logger.warning("%s is factored already and keeps its ranks and tau", self.model_name_or_path)
        return False

    def warn_about_ignored(self, training_args: CondLRTrainingArguments) -> None:
        """Warn about options that were changed and that this method ignores."""
        ours = CONVERSION if self.method == "dense" else () if self.conditioned_start else ("tau",)
        shared = {option.name for part in (TrainingArguments, AdversarialArguments) for option in fields(part)}
        options: list[tuple[Any, Any]] = [(self, option) for option in fields(self) if option.name in ours]
        options += [(training_args, option) for option in fields(training_args) if option.name not in shared]
        changed = [option.name for owner, option in options if getattr(owner, option.name) != option.default]
        if self.compression_ratio == COMPRESSION and "compression_ratio" in changed:
            changed.remove("compression_ratio")  # the default
        if changed and self.method != "condlr":
            logger.warning("method %s ignores %s", self.method, ", ".join(changed))


def _check(valid: bool, rule: str, received: object, remedy: str) -> None:
    require(valid, rule, received=received, remedy=remedy, error=ConfigError)
