r"""Train an image classifier dense, at low rank, or at low rank with bounded condition numbers, and attack it.

    accelerate launch recipes/image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name beans --compression_ratio 0.5 --learning_rate 3e-4 --output_dir outputs/beans
    accelerate launch recipes/image_classification.py recipes/configs/mnist.yaml --learning_rate 1e-3

Any data set that `datasets.load_dataset` reads: a name on the Hub, a folder of images (train/cat/1.png), a folder or
file of parquet. Any classifier of `AutoModelForImageClassification`, pretrained or fresh. Every option of
`TrainingArguments`, adversarial training and distillation. Killed and started again with the same command it goes on
from its last checkpoint. A YAML or JSON file holds the same names as the command line.

To change it, copy this file and those beside it that it and they import: `command_line.py`, `data_splits.py`,
`labelled_data.py`, `image_data.py`, `method.py`, `image_model.py`, `trainers.py`, `image_trainers.py`, `restart.py`,
`running.py`.
"""

import sys

from command_line import parse as parse_into
from command_line import require_joined
from datasets import Dataset, DatasetDict
from image_data import DataArguments, Transform, decoded, load_data
from image_model import build_model, build_processor, build_teacher, channels
from image_trainers import TRAINERS
from labelled_data import card_name
from method import MethodArguments, say_ignored
from restart import checkpoint_to_resume
from running import accuracy, attack, finish, prepare, require_whole_for_attacks, settings, train
from transformers import Trainer, default_data_collator, set_seed

from hf_condlr import CondLRTrainingArguments, RobustnessReport

ARGUMENTS = (MethodArguments, DataArguments, CondLRTrainingArguments)


def make_trainer(
    model_args: MethodArguments, data_args: DataArguments, training_args: CondLRTrainingArguments, data: DatasetDict
) -> Trainer:
    """Model, transforms and the method's Trainer, before training."""
    set_seed(training_args.seed)  # of a fresh model, or a new head
    processor = build_processor(model_args, data["train"])
    model = build_model(model_args, data["train"], processor)
    teacher = build_teacher(model_args, model)
    say_ignored(model_args, training_args)
    training_args.remove_unused_columns = False  # the transforms read the column of images
    prepare(training_args)
    return TRAINERS[model_args.method](
        model=model,
        args=training_args,
        train_dataset=data["train"].with_transform(Transform(processor, channels(model), "train")),
        eval_dataset=data["validation"].with_transform(Transform(processor, channels(model), "validation")),
        processing_class=processor,
        data_collator=default_data_collator,
        compute_metrics=accuracy,
        flip=data_args.horizontal_flip,
        padding=data_args.crop_padding,
        **({} if teacher is None else {"teacher": teacher}),
    )


def test(
    trainer: Trainer, data_args: DataArguments, images: Dataset, split: str = "test"
) -> tuple[dict[str, float], RobustnessReport | None]:
    """Loss and accuracy, and the accuracy under each attack with its report."""
    clean = images.with_transform(Transform(trainer.processing_class, channels(trainer.model), split))
    metrics = trainer.evaluate(clean, metric_key_prefix=split) | {f"{split}_samples": len(images)}
    attacked, report = attack(trainer, trainer.model, decoded(images), data_args, split)
    return metrics | attacked, report


def main(model_args: MethodArguments, data_args: DataArguments, training_args: CondLRTrainingArguments) -> None:
    """Train, evaluate, attack; write metrics and model."""
    require_joined(training_args.world_size)
    data = load_data(data_args)
    checkpoint = checkpoint_to_resume(training_args, settings(model_args, data_args, training_args))
    trainer = make_trainer(model_args, data_args, training_args, data)
    require_whole_for_attacks(trainer, data_args)
    train(trainer, checkpoint)
    trainer.save_metrics("eval", trainer.evaluate() | {"eval_samples": len(data["validation"])})

    split = "test" if "test" in data else "validation"
    metrics, report = test(trainer, data_args, data[split], split)
    finish(trainer, split, metrics, dataset=card_name(data_args.dataset_name), report=report)


def parse(argv: list[str]) -> tuple[MethodArguments, DataArguments, CondLRTrainingArguments]:
    """Of the command line; mistakes in one line."""
    return parse_into(ARGUMENTS, argv, __doc__.splitlines()[0])


if __name__ == "__main__":
    main(*parse(sys.argv[1:]))
