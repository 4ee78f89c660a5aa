"""`ModelArguments`: the options of a training script that choose its model and make a `CondLRConfig`."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import yaml  # type: ignore[import-untyped]
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from hf_condlr.config import CondLRConfig
from hf_condlr.errors import listed
from hf_condlr.layers import converted_layers
from hf_condlr.options import option
from hf_condlr.robustness.evaluation.rows import class_names, plain_name
from hf_condlr.scripts.checks import check
from hf_condlr.scripts.dataset_columns import with_labels

if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)
METHODS = ("dense", "lowrank", "condlr")
CONVERSION = (
    *("target_modules", "exclude_modules", "rank_ratio", "compression_ratio", "rank_allocation"),
    *("init_weights", "sequential_calibration", "conditioned_start", "tau"),
)


@dataclass
class ModelArguments:
    """Model: which one, and what becomes of its linear layers."""

    model_name_or_path: str | None = option(None, "Model to start from, on the Hub or in a folder, dense or factored.")
    model_type: str | None = option(
        None, "Start from random weights of this architecture instead: vit, bert, gpt2, ..."
    )
    config_overrides: str | None = option(None, "Changes of its config, as YAML: '{hidden_size: 128, image_size: 32}'.")
    method: str = option(
        "condlr", "dense; lowrank: W = U S Vᵀ without a constraint; condlr: U, V orthonormal, κ(S) ≤ 1 + tau."
    )
    target_modules: str = option("all-linear", "Layers to factor, or a regular expression.")
    exclude_modules: str | None = option(None, "Layers of those to leave dense: a regular expression for full names.")
    rank_ratio: float | None = option(None, "Rank as a share of the full rank, in (0, 1].")
    compression_ratio: float | None = option(
        None, "Share of the factored layers' weights to remove; 0.5 without a rank_ratio."
    )
    rank_allocation: str = option("uniform", "Ranks under compression_ratio: uniform, energy, or fisher (fine-tuned).")
    init_weights: str = option("svd", "svd, randomized_svd, activation_aware, fisher (fine-tuned) or orthogonal.")
    sequential_calibration: bool = option(False, "Factor each layer for the inputs behind compressed ones.")
    conditioned_start: bool = option(False, "Start within κ ≤ 1 + tau instead of lowering κ in a warm-up.")
    tau: float = option(0.1, "κ(S) ≤ 1 + tau; inf: only orthonormal U and V.")
    teacher: str | None = option(None, "Dense model of the same task to distil from; needs distillation_weight.")

    def __post_init__(self) -> None:
        given = [name for name in ("model_name_or_path", "model_type") if getattr(self, name) is not None]
        check(len(given) == 1, "exactly one of model_name_or_path and model_type must be given", given, "Choose one.")
        check(self.method in METHODS, f"method must be one of {', '.join(METHODS)}", repr(self.method), "Choose one.")
        distils = self.teacher is None or self.method == "condlr"
        check(distils, "a teacher needs method condlr", repr(self.method), "Leave the teacher out.")
        fresh = self.model_type is not None or not self.config_overrides
        check(fresh, "config_overrides needs model_type", self.config_overrides, "A pretrained model has its config.")
        if self.rank_ratio is None and self.compression_ratio is None:
            self.compression_ratio = 0.5
        self.condlr_config()  # checks the values
        if self.model_type is not None:
            self.config()

    def condlr_config(self) -> CondLRConfig:
        """The config of the conversion."""
        return CondLRConfig(**{name: getattr(self, name) for name in CONVERSION})

    def require_task(self, auto_class: Any) -> None:
        """Refuse, before any data are read, a model that `auto_class`, such as `AutoModelForCausalLM`, lacks."""
        config, task = self.config(), auto_class.__name__.removeprefix("AutoModelFor")
        known = type(config) in auto_class._model_mapping
        check(known, f"the model must be one for {task}", repr(config.model_type), "Choose another model or script.")

    def config(self) -> PreTrainedConfig:
        """The model's config, from its checkpoint or from `model_type` and `config_overrides`.

        Raises:
            ConfigError: There is no such architecture or field.
        """
        if self.model_type is None:
            return AutoConfig.from_pretrained(str(self.model_name_or_path))
        known, changes = self.model_type in CONFIG_MAPPING, yaml.safe_load(self.config_overrides or "{}")
        rule, remedy = "model_type must be one that transformers has", "For example vit, bert, gpt2."
        check(known, rule, repr(self.model_type), remedy)
        config_class = CONFIG_MAPPING[self.model_type]
        default = config_class()
        valid = isinstance(changes, dict) and all(hasattr(default, name) for name in changes)
        rule = f"config_overrides must be a mapping from fields of {config_class.__name__}"
        check(valid, rule, repr(changes), "Mind the space after each colon: {hidden_size: 128}.")
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
        config = self.config()
        config.update(changes)
        return auto_class.from_config(config)

    def align_labels(self, data: DatasetDict) -> DatasetDict:
        """Number the classes of the column `labels` as the checkpoint does, if it has the same names in another order.

        Its head would otherwise start from rows of other classes. Names are compared without case. With other names the
        data keep their numbers.
        """
        from datasets import ClassLabel

        theirs = [] if self.model_name_or_path is None else class_names(self.config())
        known = [plain_name(name) for name in theirs]
        ours = [plain_name(name) for name in data["train"].features["labels"].names]
        if known == ours or sorted(known) != sorted(ours) or len({*ours}) < len(ours):
            return data
        logger.warning("classes are numbered as in %s: %s", self.model_name_or_path, listed(theirs))
        for split, rows in data.items():
            numbers = [known.index(ours[label]) for label in rows["labels"]]
            data[split] = with_labels(rows, numbers, ClassLabel(names=theirs))
        return data

    def converts(self, model: PreTrainedModel) -> bool:
        """Whether the layers of this model are still to be factored.

        Raises:
            ConfigError: The model is factored already, and the method is dense.
        """
        if not converted_layers(model):
            return self.method != "dense"
        remedy = "Choose lowrank or condlr, or make it dense: condlr densify."
        check(self.method != "dense", "method dense needs a dense model", self.model_name_or_path, remedy)
        logger.warning("%s is factored already and keeps its ranks and tau", self.model_name_or_path)
        return False
