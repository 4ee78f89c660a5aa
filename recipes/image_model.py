"""The model of `image_classification.py`: pretrained or fresh, dense or with its linear layers factored."""

import logging
from dataclasses import dataclass, field
from typing import Any

import yaml
from command_line import require
from datasets import Dataset
from image_data import Transform
from torch.utils.data import DataLoader
from transformers import (
    CONFIG_MAPPING,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    ViTImageProcessorPil,
    default_data_collator,
)

from hf_condlr import CondLRConfig, get_robust_lowrank_model

logger = logging.getLogger("image_classification")
METHODS = ("dense", "lowrank", "condlr")
MEASURED = 2000  # training images that the mean and the standard deviation of a fresh model's input come from


@dataclass
class ModelArguments:
    """The model, and what becomes of its linear layers."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Image classifier to start from, on the Hub or in a folder."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Start from a fresh model of this type (vit, convnext, ...) instead."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "What a fresh model's config changes: {hidden_size: 128, image_size: 32}; YAML."},
    )
    method: str = field(default="condlr", metadata={"help": "dense; lowrank: U, S, V free; condlr: κ(S) ≤ 1 + tau."})
    target_modules: str = field(default="all-linear", metadata={"help": "What to convert; or a regular expression."})
    rank_ratio: float | None = field(default=None, metadata={"help": "Rank as a share of the full rank."})
    compression_ratio: float | None = field(
        default=None, metadata={"help": "Share of the converted weights removed; 0.5 if no rank_ratio is given."}
    )
    rank_allocation: str = field(default="uniform", metadata={"help": "uniform or energy: of compression_ratio."})
    rank_multiple: int = field(default=1, metadata={"help": "Round ranks from a ratio down to its multiples: 8, say."})
    init_weights: str = field(
        default="svd", metadata={"help": "svd, randomized_svd, activation_aware or orthogonal start."}
    )
    calibration_samples: int = field(default=256, metadata={"help": "Training images for activation_aware."})
    tau: float = field(default=0.1, metadata={"help": "Condition numbers stay ≤ 1 + tau; inf: orthonormal U, V only."})
    teacher: str | None = field(
        default=None, metadata={"help": "Dense classifier of the same data to distil from; see distillation_weight."}
    )

    def __post_init__(self) -> None:
        starts = [name for name in ("model_name_or_path", "model_type") if getattr(self, name) is not None]
        require(len(starts) == 1, "one of model_name_or_path and model_type must be given", starts)
        require(self.method in METHODS, f"method must be one of {', '.join(METHODS)}", self.method)
        require(self.calibration_samples >= 1, "calibration_samples must be ≥ 1", self.calibration_samples)
        require(self.teacher is None or self.method == "condlr", "a teacher needs method condlr", self.method)
        if self.rank_ratio is None and self.compression_ratio is None:
            self.compression_ratio = 0.5
        # What is given is checked now, not after the data are read.
        self.condlr_config()
        if self.model_type is not None:
            self.fresh_config()
        require(
            self.model_type or not self.config_overrides, "config_overrides needs model_type", self.config_overrides
        )

    def condlr_config(self) -> CondLRConfig:
        """How layers are factored."""
        names = ("target_modules", "rank_ratio", "compression_ratio", "rank_allocation", "rank_multiple")
        names += ("init_weights", "tau")
        return CondLRConfig(**{name: getattr(self, name) for name in names})

    def fresh_config(self) -> PreTrainedConfig:
        """Of a model from scratch."""
        known = self.model_type in CONFIG_MAPPING
        require(known, "model_type must be one that transformers has", self.model_type, "vit or convnext, say.")
        changes = yaml.safe_load(self.config_overrides or "{}")
        rule = "config_overrides must be a mapping such as {hidden_size: 128}"
        require(isinstance(changes, dict), rule, self.config_overrides, "Mind the space behind each colon.")
        config_class = CONFIG_MAPPING[self.model_type]
        unknown = sorted(name for name in changes if not hasattr(config_class(), name))
        require(not unknown, f"config_overrides must be fields of {config_class.__name__}", unknown)
        return config_class(**changes)


def build_processor(args: ModelArguments, train: Dataset) -> Any:
    """The model's own; for a fresh model one that resizes to its image size and normalises by the training images."""
    if args.model_name_or_path is not None:
        return AutoImageProcessor.from_pretrained(args.model_name_or_path)
    config = args.fresh_config()
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    plain = ViTImageProcessorPil(size={"height": height, "width": width}, do_normalize=False)
    some = train.shuffle(seed=0).select(range(min(MEASURED, len(train))))
    images = Transform(plain, config.num_channels, "train")(some[:])["pixel_values"]  # (N, c, h, w)
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3)).clamp_min(1 / 255)
    return ViTImageProcessorPil(size=plain.size, image_mean=mean.tolist(), image_std=std.tolist())


def build_model(args: ModelArguments, train: Dataset, processor: Any) -> PreTrainedModel:
    """The dense start with a head for these classes, and for the low-rank methods its layers factored."""
    names = train.features["labels"].names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if args.model_type is not None:
        config = args.fresh_config()
        config.update({"num_labels": len(names), **labels})
        model = AutoModelForImageClassification.from_config(config)
    else:
        model = AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path,
            ignore_mismatched_sizes=True,  # a head for other classes is drawn anew
            **labels,
        )
    if hasattr(model, "condlr_config"):
        remedy = "Choose lowrank or condlr, or make it dense: condlr densify."
        require(args.method != "dense", "method dense needs a dense model", args.model_name_or_path, remedy)
        logger.warning("%s is factored already: rank, targets and tau stay those of it", args.model_name_or_path)
        return model
    if args.method == "dense":
        return model
    calibration = None
    if args.init_weights == "activation_aware":
        samples = train.shuffle(seed=0).select(range(min(args.calibration_samples, len(train))))
        samples = samples.with_transform(Transform(processor, channels(model), "train"))
        calibration = DataLoader(samples, batch_size=32, collate_fn=default_data_collator)
    return get_robust_lowrank_model(model, args.condlr_config(), calibration_data=calibration)


def build_teacher(args: ModelArguments, model: PreTrainedModel) -> PreTrainedModel | None:
    """The dense model to distil from, of the same classes in the same order."""
    if args.teacher is None:
        return None
    teacher = AutoModelForImageClassification.from_pretrained(args.teacher)
    rule = f"the teacher must know the classes {', '.join(list(model.config.label2id)[:5])}, ... in this order"
    same = teacher.config.num_labels == model.config.num_labels
    require(same and teacher.config.id2label == model.config.id2label, rule, list(teacher.config.label2id)[:5])
    return teacher


def channels(model: PreTrainedModel) -> int:
    """Of the images that the model takes."""
    return getattr(model.config, "num_channels", 3)
