r"""Train a text classifier dense, at low rank, or at low rank with bounded condition numbers, and attack it.

    accelerate launch recipes/text_classification.py recipes/configs/docstrings.yaml
    accelerate launch recipes/text_classification.py --model_name_or_path bert-base-uncased \
        --dataset_name glue --dataset_config_name mrpc --compression_ratio 0.4 --tau 1 --output_dir outputs/mrpc
    accelerate launch recipes/text_classification.py recipes/configs/sst2_minilm.yaml --learning_rate 3e-5

Any data set of one or two columns of text that `datasets.load_dataset` reads: a name on the Hub, a folder, a parquet,
csv or json file. Any classifier of `AutoModelForSequenceClassification`, encoder or decoder, pretrained or fresh. Every
option of `TrainingArguments`, adversarial training and distillation. Killed and started again with the same command it
goes on from its last checkpoint. A YAML or JSON file holds the same names as the command line.

To change it, copy this file and those beside it that it and they import: `command_line.py`, `data_splits.py`,
`docstrings.py`, `fresh_tokenizer.py`, `labelled_data.py`, `text_data.py`, `method.py`, `text_model.py`, `trainers.py`,
`restart.py`, `running.py`.
"""

import sys

from command_line import parse as parse_into
from command_line import require_joined
from datasets import DatasetDict
from labelled_data import card_name
from method import say_ignored
from restart import checkpoint_to_resume
from running import accuracy, attack, finish, prepare, require_whole_for_attacks, settings, train
from text_data import DataArguments, encode, load_data
from text_model import ModelArguments, build_model, build_teacher, build_tokenizer
from trainers import TRAINERS
from transformers import DataCollatorWithPadding, Trainer, set_seed

from hf_condlr import CondLRTrainingArguments

ARGUMENTS = (ModelArguments, DataArguments, CondLRTrainingArguments)


def make_trainer(
    model_args: ModelArguments, data_args: DataArguments, training_args: CondLRTrainingArguments, data: DatasetDict
) -> Trainer:
    """Model, tokens and the method's Trainer, before training."""
    set_seed(training_args.seed)  # of a fresh model, or a new head
    tokenizer = build_tokenizer(model_args, data["train"])
    model = build_model(model_args, data["train"], tokenizer, data_args.max_length)
    teacher = build_teacher(model_args, model, tokenizer)
    say_ignored(model_args, training_args)
    prepare(training_args)
    return TRAINERS[model_args.method](
        model=model,
        args=training_args,
        train_dataset=encode(data["train"], tokenizer, "train"),
        eval_dataset=encode(data["validation"], tokenizer, "validation"),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        **({} if teacher is None else {"teacher": teacher}),
    )


def main(model_args: ModelArguments, data_args: DataArguments, training_args: CondLRTrainingArguments) -> None:
    """Train, evaluate, attack; write metrics and model."""
    require_joined(training_args.world_size)
    data = load_data(data_args)
    checkpoint = checkpoint_to_resume(training_args, settings(model_args, data_args, training_args))
    trainer = make_trainer(model_args, data_args, training_args, data)
    require_whole_for_attacks(trainer, data_args)
    train(trainer, checkpoint)
    trainer.save_metrics("eval", trainer.evaluate() | {"eval_samples": len(data["validation"])})

    split = "test" if "test" in data else "validation"
    texts = data[split].remove_columns("row")
    clean = encode(data[split], trainer.processing_class, split)
    metrics = trainer.evaluate(clean, metric_key_prefix=split) | {f"{split}_samples": len(texts)}
    attacked, report = attack(trainer, trainer.model, texts, data_args, split)
    finish(trainer, split, metrics | attacked, dataset=card_name(data_args.dataset_name), report=report)


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, CondLRTrainingArguments]:
    """Of the command line; mistakes in one line."""
    return parse_into(ARGUMENTS, argv, __doc__.splitlines()[0])


if __name__ == "__main__":
    main(*parse(sys.argv[1:]))
