r"""Fine-tune an image classifier dense, at low rank, or at low rank with bounded condition numbers, and attack it.

    accelerate launch recipes/image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name beans --compression_ratio 0.5 --learning_rate 3e-4 --output_dir outputs/beans
    accelerate launch recipes/image_classification.py recipe.yaml --learning_rate 1e-3

Any data set that `datasets.load_dataset` reads: a name on the Hub, a folder of images (train/cat/1.png), a folder or
file of parquet. Any classifier of `AutoModelForImageClassification`. Every option of `TrainingArguments`. A YAML or
JSON file holds the same names as the command line; what follows it on the command line wins.
"""

import itertools
import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    Trainer,
    default_data_collator,
    set_seed,
)

from hf_condlr import (
    CondLRConfig,
    CondLRTrainer,
    CondLRTrainingArguments,
    FactoredTrainer,
    FactoredTrainerMixin,
    RobustnessReport,
    condition_report,
    evaluate_robustness,
    get_robust_lowrank_model,
)
from hf_condlr.attacks import PGD

logger = logging.getLogger("image_classification")
METHODS = ("dense", "lowrank", "condlr")


@dataclass
class ModelArguments:
    """The model, and what becomes of its linear layers."""

    model_name_or_path: str = field(metadata={"help": "Image classifier to start from, on the Hub or in a folder."})
    method: str = field(default="condlr", metadata={"help": "dense; lowrank: U, S, V free; condlr: κ(S) ≤ 1 + tau."})
    target_modules: str = field(default="all-linear", metadata={"help": "What to convert; or a regular expression."})
    rank_ratio: float | None = field(default=None, metadata={"help": "Rank as a share of the full rank."})
    compression_ratio: float | None = field(
        default=None, metadata={"help": "Share of the converted weights removed; 0.5 if no rank_ratio is given."}
    )
    rank_allocation: str = field(default="uniform", metadata={"help": "uniform or energy: of compression_ratio."})
    init_weights: str = field(
        default="svd", metadata={"help": "svd, randomized_svd, activation_aware or orthogonal start."}
    )
    calibration_samples: int = field(default=256, metadata={"help": "Training images for activation_aware."})
    tau: float = field(default=0.1, metadata={"help": "Condition numbers stay ≤ 1 + tau; inf: orthonormal U, V only."})
    teacher: str | None = field(
        default=None, metadata={"help": "Dense classifier of the same data to distil from; see distillation_weight."}
    )

    def __post_init__(self) -> None:
        _require(self.method in METHODS, f"method must be one of {', '.join(METHODS)}", self.method)
        _require(self.calibration_samples >= 1, "calibration_samples must be ≥ 1", self.calibration_samples)
        _require(self.teacher is None or self.method == "condlr", "a teacher needs method condlr", self.method)
        if self.rank_ratio is None and self.compression_ratio is None:
            self.compression_ratio = 0.5
        self.condlr_config()  # the library checks what it is given: now, not after the data are read

    def condlr_config(self) -> CondLRConfig:
        names = ("target_modules", "rank_ratio", "compression_ratio", "rank_allocation", "init_weights", "tau")
        return CondLRConfig(**{name: getattr(self, name) for name in names})


@dataclass
class DataArguments:
    """The images, and the attacks that the test split meets."""

    dataset_name: str = field(metadata={"help": "Name on the Hub, folder of images or parquet, or a parquet file."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a data set of several."})
    image_column: str | None = field(default=None, metadata={"help": "The only column of images if not given."})
    label_column: str | None = field(default=None, metadata={"help": "The only column of class labels if not given."})
    validation_fraction: float = field(
        default=0.15, metadata={"help": "Held out of the training split where there is no validation split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on so many, for a try."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Validate and test on so many, for a try."})
    horizontal_flip: bool = field(default=False, metadata={"help": "Mirror half of the training images."})
    crop_padding: int = field(default=0, metadata={"help": "Shift training images by up to so many pixels."})
    epsilons: list[float] = field(
        default_factory=list, metadata={"help": "ℓ∞ radii of PGD on the test split, for pixels in [0, 1]."}
    )
    pgd_steps: int = field(default=10, metadata={"help": "Gradient steps of an attack."})
    attack_checks: bool = field(default=True, metadata={"help": "Look for signs that the attacks failed."})

    def __post_init__(self) -> None:
        for name in ("max_train_samples", "max_eval_samples"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be ≥ 1", value)
        _require(0 < self.validation_fraction < 1, "validation_fraction must lie in (0, 1)", self.validation_fraction)
        _require(self.crop_padding >= 0, "crop_padding must be ≥ 0", self.crop_padding)
        self.attacks()

    def attacks(self) -> list[PGD]:
        return [PGD(epsilon=epsilon, norm="linf", steps=self.pgd_steps) for epsilon in self.epsilons]


def _require(condition: object, rule: str, received: object) -> None:
    if not condition:
        raise ValueError(f"{rule}; received {received!r}")


def load_data(args: DataArguments) -> DatasetDict:
    """The splits train, validation and, where the data have one, test, with the columns `image` and `labels`."""
    path = Path(args.dataset_name)
    if path.suffix == ".parquet":
        data = load_dataset("parquet", data_files=str(path))
    else:
        data = load_dataset(args.dataset_name, args.dataset_config_name)
    _require("train" in data, "the data must have a split named train", list(data))
    columns = data["train"].features
    image = _column(args.image_column, "image_column", columns, Image)
    label = _column(args.label_column, "label_column", columns, ClassLabel)
    data = data.select_columns([image, label]).rename_columns({image: "image", label: "labels"})
    if not isinstance(data["train"].features["labels"], ClassLabel):
        for split in data:
            data[split] = data[split].class_encode_column("labels")
    if "validation" not in data:
        # The same images whatever the training's seed: learning rates are compared on them.
        held_out = data["train"].train_test_split(args.validation_fraction, seed=0, stratify_by_column="labels")
        data["train"], data["validation"] = held_out["train"], held_out["test"]
    if "test" in data and min(data["test"]["labels"]) < 0:
        del data["test"]  # a test split whose labels are kept secret
    for split, limit in (
        ("train", args.max_train_samples),
        ("validation", args.max_eval_samples),
        ("test", args.max_eval_samples),
    ):
        if limit is not None and split in data and limit < len(data[split]):
            data[split] = data[split].shuffle(seed=0).select(range(limit))  # files often come sorted by class
    return data


def _column(given: str | None, option: str, columns: dict[str, Any], kind: type) -> str:
    if given is not None:
        _require(given in columns, f"{option} must be one of {', '.join(columns)}", given)
        return given
    found = [name for name, feature in columns.items() if isinstance(feature, kind)]
    _require(len(found) == 1, f"the data must have one column of {kind.__name__}, or --{option} must name it", found)
    return found[0]


class Transform:
    """Images into what the model takes: resized and normalised as its processor says, augmented where asked.

    Args:
        processor: The model's image processor.
        channels: Of the model; gray images become colour for 3.
        flip: Mirror an image with probability ½.
        padding: Shift an image by up to so many pixels, edges repeated.
        options: For the processor; `do_normalize=False` leaves pixels in [0, 1], where attacks are measured.
    """

    def __init__(self, processor: Any, channels: int = 3, flip: bool = False, padding: int = 0, **options: Any) -> None:
        self.processor, self.flip, self.padding, self.options = processor, flip, padding, options
        self.mode = "RGB" if channels == 3 else "L"

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert(self.mode) for image in batch["image"]]
        pixels = self.processor(images, return_tensors="pt", **self.options)["pixel_values"]  # (N, c, h, w)
        if self.flip:
            pixels = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(-1), pixels)
        if self.padding:
            height, width = pixels.shape[-2:]
            padded = torch.nn.functional.pad(pixels, [self.padding] * 4, mode="replicate")
            corners = torch.randint(0, 2 * self.padding + 1, (len(pixels), 2)).tolist()
            shifted = [x[:, i : i + height, j : j + width] for x, (i, j) in zip(padded, corners, strict=True)]
            pixels = torch.stack(shifted)
        return {"pixel_values": pixels, "labels": batch["labels"]}


def build_model(args: ModelArguments, train: Dataset, processor: Any) -> PreTrainedModel:
    """The dense start with a head for these classes, and for the low-rank methods its layers factored."""
    names = train.features["labels"].names
    model = AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        ignore_mismatched_sizes=True,  # a head for other classes is drawn anew
    )
    if hasattr(model, "condlr_config"):
        logger.warning("%s is factored already: rank, targets and tau stay those of it", args.model_name_or_path)
        return model
    if args.method == "dense":
        return model
    calibration = None
    if args.init_weights == "activation_aware":
        samples = train.shuffle(seed=0).select(range(min(args.calibration_samples, len(train))))
        samples = samples.with_transform(Transform(processor, channels(model)))
        calibration = DataLoader(samples, batch_size=32, collate_fn=default_data_collator)
    return get_robust_lowrank_model(model, args.condlr_config(), calibration_data=calibration)


def channels(model: PreTrainedModel) -> int:
    """Of the images that the model takes."""
    return getattr(model.config, "num_channels", 3)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Of the class with the largest logit."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def make_trainer(
    model_args: ModelArguments,
    training_args: CondLRTrainingArguments,
    data: DatasetDict,
    flip: bool = False,
    padding: int = 0,
) -> Trainer:
    """Model, transforms and the method's Trainer, before training."""
    set_seed(training_args.seed)  # of a new head
    processor = AutoImageProcessor.from_pretrained(model_args.model_name_or_path)
    model = build_model(model_args, data["train"], processor)
    training_args.remove_unused_columns = False  # the transforms read the column of images
    augmenting = Transform(processor, channels(model), flip, padding)
    settings = {
        "model": model,
        "args": training_args,
        "train_dataset": data["train"].with_transform(augmenting),
        "eval_dataset": data["validation"].with_transform(Transform(processor, channels(model))),
        "processing_class": processor,
        "data_collator": default_data_collator,
        "compute_metrics": accuracy,
    }
    if model_args.method != "condlr":
        return (Trainer if model_args.method == "dense" else FactoredTrainer)(**settings)
    teacher = None
    if model_args.teacher is not None:
        teacher = AutoModelForImageClassification.from_pretrained(model_args.teacher)
    return CondLRTrainer(teacher=teacher, **settings)


def test(
    trainer: Trainer, images: Dataset, attacks: list[PGD], prefix: str = "test", checks: bool = True
) -> tuple[dict[str, float], RobustnessReport | None]:
    """Loss and accuracy, and the accuracy under each attack with its report."""
    clean = images.with_transform(Transform(trainer.processing_class, channels(trainer.model)))
    metrics = trainer.evaluate(clean, metric_key_prefix=prefix) | {f"{prefix}_samples": len(images)}
    if not attacks:
        return metrics, None
    report = evaluate_robustness(
        trainer.model,
        images,
        attacks,
        processor=trainer.processing_class,
        accelerator=trainer.accelerator,
        batch_size=trainer.args.eval_batch_size,
        checks=checks,
        progress=not trainer.args.disable_tqdm,
    )
    metrics |= {f"{prefix}_accuracy_pgd_{r.epsilon:g}": r.robust_accuracy for r in report.attacks}
    return metrics, report


def save(trainer: Trainer, folder: Path) -> None:
    """The model, its image processor, and what became of the condition numbers."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "condlr_config"):
        report = condition_report(model)
        (folder / "condition_report.json").write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    model.save_pretrained(folder)  # the factors alone; `import hf_condlr` loads them
    trainer.processing_class.save_pretrained(folder)


def main(model_args: ModelArguments, data_args: DataArguments, training_args: CondLRTrainingArguments) -> None:
    """Train, evaluate, attack; write metrics and model."""
    data = load_data(data_args)
    trainer = make_trainer(model_args, training_args, data, data_args.horizontal_flip, data_args.crop_padding)
    if trainer.is_world_process_zero() and hasattr(trainer.model, "condlr_conversion"):
        print(trainer.model.condlr_conversion)
    resume = training_args.resume_from_checkpoint  # a folder, or true for the last checkpoint in output_dir
    output = trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(str(resume).lower(), resume))
    trainer.save_metrics("train", output.metrics)
    trainer.save_state()

    trainer.save_metrics("eval", trainer.evaluate() | {"eval_samples": len(data["validation"])})
    split = "test" if "test" in data else "validation"
    metrics, report = test(trainer, data[split], data_args.attacks(), split, data_args.attack_checks)
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    if trainer.is_world_process_zero():
        save(trainer, Path(training_args.output_dir))
    card = {"dataset": None if Path(data_args.dataset_name).exists() else data_args.dataset_name}
    if report is not None and trainer.is_world_process_zero():
        print(report)
        report.save(Path(training_args.output_dir) / "robustness.json")
    if report is not None and isinstance(trainer, FactoredTrainerMixin):
        card["robustness"] = report.card_entries()
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, CondLRTrainingArguments]:
    """From the command line, after the options of a YAML or JSON file if one comes first; mistakes in one line."""
    parser = HfArgumentParser((ModelArguments, DataArguments, CondLRTrainingArguments), allow_abbrev=False)
    try:
        if argv and argv[0].endswith((".yaml", ".yml", ".json")):
            options = yaml.safe_load(Path(argv[0]).read_text())  # JSON is YAML
            _require(isinstance(options, dict), f"{argv[0]} must hold options and their values", options)
            argv = [*itertools.chain.from_iterable(_words(*option) for option in options.items()), *argv[1:]]
        return parser.parse_args_into_dataclasses(argv)
    except (ValueError, OSError, yaml.YAMLError) as error:  # the library's errors about arguments are ValueErrors too
        parser.error(str(error))


def _words(name: str, value: Any) -> list[str]:
    """As on the command line, which knows each option's type (YAML takes 1e-3 for text)."""
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(json.dumps(v) if isinstance(v, (dict, bool)) else str(v) for v in values)]


if __name__ == "__main__":
    main(*parse(sys.argv[1:]))
