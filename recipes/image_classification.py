r"""Train an image classifier dense, at low rank, or at low rank with bounded condition numbers, and attack it.

    accelerate launch recipes/image_classification.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name beans --compression_ratio 0.5 --learning_rate 3e-4 --output_dir outputs/beans
    accelerate launch recipes/image_classification.py recipes/configs/mnist.yaml --learning_rate 1e-3

Any data set that `datasets.load_dataset` reads: a name on the Hub, a folder of images (train/cat/1.png), a folder or
file of parquet. Any classifier of `AutoModelForImageClassification`, pretrained or fresh. Every option of
`TrainingArguments`, adversarial training and distillation. Killed and started again with the same command it goes on
from its last checkpoint. A YAML or JSON file holds the same names as the command line.

To change it, copy this file and those beside it that it imports: `command_line.py`, `image_data.py`, `image_model.py`,
`image_trainers.py`, `restart.py`.
"""

import json
import logging
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch
from command_line import parse as parse_into
from command_line import require_joined
from datasets import Dataset, DatasetDict
from image_data import DataArguments, Transform, decoded, load_data
from image_model import ModelArguments, build_model, build_processor, build_teacher, channels
from image_trainers import TRAINERS
from restart import checkpoint_to_resume, steps_done
from transformers import EvalPrediction, Trainer, default_data_collator, set_seed

from hf_condlr import CondLRTrainingArguments, RobustnessReport, condition_report, evaluate_robustness
from hf_condlr.attacks import Attack

logger = logging.getLogger("image_classification")
CONSTRAINT = (
    *("conditioning_warmup_ratio", "factor_learning_rate", "core_learning_rate", "metric_scaling"),
    *("projection_interval", "distillation_weight", "distillation_temperature"),
)  # what only condlr has
ATTACKING = ("attacks", "epsilons", "attack_steps", "max_attack_samples", "attack_checks")  # trains no other model


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
    set_seed(training_args.seed)  # of a fresh model, or a new head
    processor = build_processor(model_args, data["train"])
    model = build_model(model_args, data["train"], processor)
    teacher = build_teacher(model_args, model)
    _say_ignored(model_args.method, training_args)
    training_args.remove_unused_columns = False  # the transforms read the column of images
    training_args.dataloader_pin_memory &= torch.accelerator.is_available()  # else torch warns at each loader
    return TRAINERS[model_args.method](
        model=model,
        args=training_args,
        train_dataset=data["train"].with_transform(Transform(processor, channels(model), "train")),
        eval_dataset=data["validation"].with_transform(Transform(processor, channels(model), "validation")),
        processing_class=processor,
        data_collator=default_data_collator,
        compute_metrics=accuracy,
        flip=flip,
        padding=padding,
        **({} if teacher is None else {"teacher": teacher}),
    )


def _say_ignored(method: str, args: CondLRTrainingArguments) -> None:
    """One file serves all methods, but nobody is to believe that an option worked that did not."""
    ignored = [] if method == "condlr" else [o for o in fields(args) if o.name in CONSTRAINT]
    changed = [option.name for option in ignored if getattr(args, option.name) != option.default]
    if changed:
        logger.warning("method %s takes no notice of %s", method, ", ".join(changed))


def test(
    trainer: Trainer,
    images: Dataset,
    attacks: list[Attack],
    prefix: str = "test",
    checks: bool = True,
    max_samples: int | None = None,
    output_dir: Path | None = None,
) -> tuple[dict[str, float], RobustnessReport | None]:
    """Loss and accuracy, and the accuracy under each attack with its report; `output_dir` keeps finished batches."""
    clean = images.with_transform(Transform(trainer.processing_class, channels(trainer.model), prefix))
    metrics = trainer.evaluate(clean, metric_key_prefix=prefix) | {f"{prefix}_samples": len(images)}
    if not attacks:
        return metrics, None
    report = evaluate_robustness(
        trainer.model,
        decoded(images),
        attacks,
        processor=trainer.processing_class,
        accelerator=trainer.accelerator,
        batch_size=trainer.args.eval_batch_size,
        checks=checks,
        max_samples=max_samples,
        output_dir=output_dir,
        progress=not trainer.args.disable_tqdm,
    )
    metrics |= {
        f"{prefix}_accuracy_{r.name.replace('-', '_')}_{r.epsilon:g}": r.robust_accuracy for r in report.attacks
    }
    metrics |= {f"{prefix}_robust_accuracy": report.robust_accuracy, f"{prefix}_attacked_samples": report.samples}
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
    require_joined(training_args.world_size)
    data = load_data(data_args)
    images = {name: value for name, value in asdict(data_args).items() if name not in ATTACKING}
    depends_on = asdict(model_args) | images | {"processes": training_args.world_size}
    checkpoint = checkpoint_to_resume(training_args, depends_on)
    trainer = make_trainer(model_args, training_args, data, data_args.horizontal_flip, data_args.crop_padding)
    if trainer.is_world_process_zero() and hasattr(trainer.model, "condlr_conversion"):
        print(trainer.model.condlr_conversion)
    output = trainer.train(resume_from_checkpoint=checkpoint)
    done = steps_done(checkpoint)
    if trainer.state.global_step > done:  # else all was trained, and its metrics lie there
        # Where training went on, its loss and time are those of the rest.
        trainer.save_metrics("train", output.metrics | {"train_steps_before": done})
    trainer.save_state()

    trainer.save_metrics("eval", trainer.evaluate() | {"eval_samples": len(data["validation"])})
    split, folder = "test" if "test" in data else "validation", Path(training_args.output_dir)
    limits = {"checks": data_args.attack_checks, "max_samples": data_args.max_attack_samples}
    metrics, report = test(
        trainer, data[split], data_args.make_attacks(), split, output_dir=folder / "attacks", **limits
    )
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    if trainer.is_world_process_zero():
        save(trainer, folder)
    card = {"dataset": None if Path(data_args.dataset_name).exists() else data_args.dataset_name}
    if report is not None and trainer.is_world_process_zero():
        print(report)
        report.save(folder / "robustness.json")
    if report is not None and hasattr(trainer.model, "condlr_config"):
        card["robustness"] = report.card_entries()
    if training_args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, CondLRTrainingArguments]:
    """Of the command line; mistakes in one line."""
    return parse_into((ModelArguments, DataArguments, CondLRTrainingArguments), argv, __doc__.splitlines()[0])


if __name__ == "__main__":
    main(*parse(sys.argv[1:]))
