r"""Train an image classifier dense, at low rank, or at low rank with bounded condition numbers, and attack it.

    accelerate launch image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name beans --compression_ratio 0.5 --learning_rate 3e-4 --output_dir outputs/beans
    accelerate launch image_classification.py configs/mnist.yaml --learning_rate 1e-3

Any classifier of `AutoModelForImageClassification`, pretrained or with random weights; any data set that
`datasets.load_dataset` reads. Killed and started again with the same command it resumes from its last checkpoint.
Copy this file and change it: it needs no other.
"""

import io
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image
from torch.nn.functional import pad
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    PreTrainedModel,
    ViTImageProcessorPil,
    default_data_collator,
    set_seed,
)

from hf_condlr import (
    AttackArguments,
    CondLRTrainingArguments,
    DatasetArguments,
    ModelArguments,
    RobustAccuracy,
    ScriptParser,
    checkpoint_to_resume,
    find_column,
    get_robust_lowrank_model,
    labelled,
    readable_rows,
    train_and_save,
    trainer_class,
    write_results,
)

CALIBRATION_SAMPLES = 512  # training images that init_weights and rank_allocation measure, where they depend on data
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # PIL's modes of at most 8 bits a channel


@dataclass
class ImageArguments(DatasetArguments):
    """Images: which, and how those of the training are varied."""

    image_column: str | None = field(default=None, metadata={"help": "By default the only column of images."})
    label_column: str | None = field(default=None, metadata={"help": "By default the only column of class labels."})
    horizontal_flip: bool = field(default=False, metadata={"help": "Mirror half of the training images."})
    crop_padding: int = field(default=0, metadata={"help": "Shift training images by up to this many pixels."})


def load_data(args: ImageArguments, processes: int) -> DatasetDict:
    """Splits train, validation and perhaps test of the columns image (encoded, as stored), labels and source_row."""
    data = args.load()
    columns = data["train"].features
    image = find_column(columns, "image_column", args.image_column, lambda _, kind: isinstance(kind, Image), "images")
    classes = "class labels"
    label = find_column(
        columns, "label_column", args.label_column, lambda _, kind: isinstance(kind, ClassLabel), classes
    )
    data = args.hold_out(labelled(data, label, {image: "image"}), "labels")
    data = data.cast_column("image", Image(decode=False))
    return readable_rows(data, unreadable, skip=args.skip_unreadable, processes=processes)


def unreadable(row: dict[str, Any]) -> str | None:
    """The fault of a row's image, and its file; None if the image can be read."""
    if row["image"] is None:
        return "no image"
    try:
        read_image(row["image"])
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and others
        return f"{type(error).__name__}: {error}" + (f" ({row['image']['path']})" if row["image"]["path"] else "")
    return None


def read_image(cell: dict[str, Any]) -> PIL.Image.Image:
    """Read the image, upright as `datasets` decodes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        content = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
        image = PIL.Image.open(io.BytesIO(content))
        image.load()
    if image.mode not in EIGHT_BITS:  # conversion would cut pixels off
        raise ValueError(f"images must have 8 bits a channel; received mode {image.mode}")
    return PIL.ImageOps.exif_transpose(image)


class Transform:
    """Turn rows into inputs of the model: grey or colour as in its config, resized and normalised by its processor."""

    def __init__(self, processor: Any, config: Any) -> None:
        channels = getattr(config, "num_channels", 3)
        if channels not in (1, 3):
            raise ValueError(f"the model must take images of 1 or 3 channels; received {channels}")
        self.processor, self.mode = processor, "RGB" if channels == 3 else "L"

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [read_image(cell).convert(self.mode) for cell in batch["image"]]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]  # (N, c, h, w)
        return {"pixel_values": pixels, "labels": batch["labels"]}


def augment(pixels: torch.Tensor, generator: torch.Generator, flip: bool, padding: int) -> torch.Tensor:
    """Augment images (N, c, h, w): each is mirrored with probability ½ and shifted by up to `padding` pixels."""
    if flip:
        mirrored = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
        pixels = torch.where(mirrored.to(pixels.device), pixels.flip(-1), pixels)
    if not padding:
        return pixels
    height, width = pixels.shape[-2:]
    padded = pad(pixels, [padding] * 4, mode="replicate")
    corners = torch.randint(0, 2 * padding + 1, (len(pixels), 2), generator=generator).tolist()
    return torch.stack([x[:, i : i + height, j : j + width] for x, (i, j) in zip(padded, corners, strict=True)])


def build_processor(args: ModelArguments, train: Dataset) -> Any:
    """The model's processor; for random weights one that resizes to its size and normalises by training images."""
    if args.model_name_or_path is not None:
        return AutoImageProcessor.from_pretrained(args.model_name_or_path)
    config = args.config()
    width, height = read_image(train[0]["image"]).size
    size = getattr(config, "image_size", None) or (height, width)  # convolutional networks take any
    height, width = (size, size) if isinstance(size, int) else size
    plain = ViTImageProcessorPil(size={"height": height, "width": width}, do_normalize=False)
    images = Transform(plain, config)(train.shuffle(seed=0).take(2000)[:])["pixel_values"]
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3)).clamp_min(1 / 255)
    return ViTImageProcessorPil(size=plain.size, image_mean=mean.tolist(), image_std=std.tolist())


def build_teacher(name: str | None, model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """The dense model to distil from, which must have the same classes in the same order."""
    if name is None:
        return {}
    teacher = AutoModelForImageClassification.from_pretrained(name)
    if teacher.config.id2label != model.config.id2label:
        known, wanted = list(teacher.config.label2id)[:5], list(model.config.label2id)[:5]
        raise ValueError(f"the teacher must know the classes {wanted}, ... in this order; received {known}, ...")
    return {"teacher": teacher}


class Augmentation:
    """Augment each training batch on its device; put this class before a Trainer class.

    The draws depend on the seed, the step, the part of its accumulated batch and the process, so that a training
    that was killed and resumed draws what an uninterrupted one would have drawn.
    """

    flip, padding = False, 0
    position = (-1, 0)  # step, and how many batches it has had

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        step = self.state.global_step
        self.position = (step, self.position[1] + 1 if self.position[0] == step else 0)
        generator = torch.Generator().manual_seed(
            hash((self.args.seed, *self.position, self.accelerator.process_index))
        )
        inputs["pixel_values"] = augment(inputs["pixel_values"], generator, self.flip, self.padding)
        return super().training_step(model, inputs, *args, **kwargs)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of correct classes; `evaluate.load("accuracy")` would need the network."""
    scores = prediction.predictions  # (N, classes)
    scores = scores[0] if isinstance(scores, tuple) else scores
    metric = RobustAccuracy(keep_in_memory=True)  # a metric of `evaluate`; without an attack it is the accuracy
    found = metric.compute(predictions=scores.argmax(-1), references=prediction.label_ids)
    return {"accuracy": found["robust_accuracy"]}


def main(
    model_args: ModelArguments,
    data_args: ImageArguments,
    attack_args: AttackArguments,
    training_args: CondLRTrainingArguments,
) -> None:
    """Train, save, evaluate, attack."""
    # Wrong options are refused before the data are read.
    attack_args.make_attacks("pixels")
    model_args.require_task(AutoModelForImageClassification)
    training_args.remove_unused_columns = False  # the transforms read the column of images
    training_args.dataloader_pin_memory &= torch.accelerator.is_available()

    with training_args.main_process_first():  # the others find the data in the cache
        data = load_data(data_args, training_args.dataloader_num_workers)
    checkpoint = checkpoint_to_resume(training_args, model_args, data_args)

    # Model
    set_seed(training_args.seed)  # of random weights, or of a new head
    processor = build_processor(model_args, data["train"])
    data = model_args.align_labels(data)
    names = data["train"].features["labels"].names
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = model_args.load_model(AutoModelForImageClassification, **labels)
    inputs = data.with_transform(Transform(processor, model.config))

    # Conversion: each linear layer becomes U S Vᵀ
    if model_args.converts(model):
        config = model_args.condlr_config()
        calibration = inputs["train"].shuffle(seed=0).take(CALIBRATION_SAMPLES)
        loader = DataLoader(calibration, batch_size=32, collate_fn=default_data_collator)
        get_robust_lowrank_model(model, config, calibration_data=loader if config.needs_calibration_data else None)

    # Trainer
    augmented = type("AugmentingTrainer", (Augmentation, trainer_class(model_args.method)), {})
    trainer = augmented(
        model=model,
        args=training_args,
        train_dataset=inputs["train"],
        eval_dataset=inputs["validation"],
        processing_class=processor,
        data_collator=default_data_collator,
        compute_metrics=accuracy,
        **build_teacher(model_args.teacher, model),
    )
    trainer.flip, trainer.padding = data_args.horizontal_flip, data_args.crop_padding
    attack_args.require_unsharded(trainer)
    train_and_save(trainer, checkpoint)

    # Evaluation and attacks
    trainer.save_metrics("eval", trainer.evaluate() | {"eval_samples": len(data["validation"])})
    split = "test" if "test" in data else "validation"
    metrics = trainer.evaluate(inputs[split], metric_key_prefix=split) | {f"{split}_samples": len(data[split])}
    images = data[split].select_columns(["image", "labels"]).cast_column("image", Image())
    attacked, report = attack_args.evaluate(trainer, images, split)
    write_results(trainer, split, metrics | attacked, report=report, dataset=data_args.hub_name)


if __name__ == "__main__":
    options = (ModelArguments, ImageArguments, AttackArguments, CondLRTrainingArguments)
    main(*ScriptParser(options, description=__doc__.splitlines()[0]).parse())
