"""The model of `image_classification.py`: pretrained or fresh, dense or with its linear layers factored."""

from typing import Any

from datasets import Dataset
from image_data import Transform
from method import MethodArguments, class_names, dense_start, factored, require_same_classes
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTImageProcessorPil,
    default_data_collator,
)

MEASURED = 2000  # training images that the mean and the standard deviation of a fresh model's input come from


def build_processor(args: MethodArguments, train: Dataset) -> Any:
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


def build_model(args: MethodArguments, train: Dataset, processor: Any) -> PreTrainedModel:
    """The dense start with a head for these classes, and for the low-rank methods its layers factored."""
    model = dense_start(AutoModelForImageClassification, args, class_names(train))

    def calibration() -> DataLoader:
        samples = train.shuffle(seed=0).select(range(min(args.calibration_samples, len(train))))
        samples = samples.with_transform(Transform(processor, channels(model), "train"))
        return DataLoader(samples, batch_size=32, collate_fn=default_data_collator)

    return factored(model, args, calibration)


def build_teacher(args: MethodArguments, model: PreTrainedModel) -> PreTrainedModel | None:
    """The dense model to distil from, of the same classes in the same order."""
    if args.teacher is None:
        return None
    teacher = AutoModelForImageClassification.from_pretrained(args.teacher)
    require_same_classes(teacher, model)
    return teacher


def channels(model: PreTrainedModel) -> int:
    """Of the images that the model takes."""
    return getattr(model.config, "num_channels", 3)
