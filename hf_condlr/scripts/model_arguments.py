"""`ModelArguments`: the options of a training script that choose its model and make a `CondLRConfig`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_condlr.config import CondLRConfig
from hf_condlr.errors import ConfigError, require
from hf_condlr.layers import factored_layers

logger = logging.getLogger(__name__)
METHODS = ("dense", "lowrank", "condlr")
CONVERSION = (
    *("target_modules", "exclude_modules", "rank_ratio", "compression_ratio", "rank_allocation"),
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
        default=None, metadata={"help": "Changes of that architecture's config, as YAML: '{hidden_size: 128}'."}
    )
    method: str = field(
        default="condlr",
        metadata={"help": "dense; lowrank: W = U S Vᵀ without a constraint; condlr: U, V orthonormal, κ(S) ≤ 1 + tau."},
    )
    target_modules: str = field(default="all-linear", metadata={"help": "Layers to factor, or a regular expression."})
    exclude_modules: str | None = field(
        default=None, metadata={"help": "Layers of those to leave dense: a regular expression for full names."}
    )
    rank_ratio: float | None = field(default=None, metadata={"help": "Rank as a share of the full rank, in (0, 1]."})
    compression_ratio: float | None = field(
        default=None, metadata={"help": "Share of the factored layers' weights to remove; 0.5 without a rank_ratio."}
    )
    rank_allocation: str = field(
        default="uniform", metadata={"help": "Ranks under compression_ratio: uniform, energy, or fisher (fine-tuned)."}
    )
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
            self.compression_ratio = 0.5
        self.condlr_config()  # checks the values
        if self.model_type is not None:
            self.config()

    def condlr_config(self) -> CondLRConfig:
        """How layers are factored."""
        return CondLRConfig(**{name: getattr(self, name) for name in CONVERSION})

    def config(self, auto_class: Any = None) -> PreTrainedConfig:
        """The model's config, from its checkpoint or from `model_type` and `config_overrides`.

        Args:
            auto_class: For example `AutoModelForImageClassification`: models that it does not have are refused.

        Raises:
            ConfigError: There is no such architecture or field, or the architecture is not for this task.
        """
        config = self._fresh_config() if self.model_type else AutoConfig.from_pretrained(str(self.model_name_or_path))
        fits = auto_class is None or type(config) in auto_class._model_mapping
        rule = f"the model must be one for {getattr(auto_class, '__name__', '')}"
        _check(fits, rule, repr(config.model_type), "Choose another model, or the script for its task.")
        return config

    def _fresh_config(self) -> PreTrainedConfig:
        known, changes = self.model_type in CONFIG_MAPPING, yaml.safe_load(self.config_overrides or "{}")
        rule, remedy = "model_type must be one that transformers has", "For example vit, bert, gpt2."
        _check(known, rule, repr(self.model_type), remedy)
        config_class = CONFIG_MAPPING[str(self.model_type)]
        default = config_class()
        valid = isinstance(changes, dict) and all(hasattr(default, name) for name in changes)
        rule = f"config_overrides must be a mapping from fields of {config_class.__name__}"
        _check(valid, rule, repr(changes), "Mind the space after each colon: {hidden_size: 128}.")
        config = config_class(**changes)
        config.architectures = []  # None would break auto classes with a choice of models (DeiT)
        return config

    def load_model(self, auto_class: Any, **changes: Any) -> PreTrainedModel:
        """The model before its layers are factored, in float32: in bfloat16 small updates would be lost.

        Args:
            auto_class: For example `AutoModelForImageClassification`.
            changes: Changes of the model's config. If the classes change, the head starts from random weights.
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


def _check(valid: bool, rule: str, received: object, remedy: str) -> None:
    require(valid, rule, received=received, remedy=remedy, error=ConfigError)
