r"""Train a text classifier dense, at low rank, or at low rank with bounded condition numbers, and attack it.

    accelerate launch text_classification.py --model_name_or_path bert-base-uncased --dataset_name glue \
        --dataset_config_name mrpc --text_columns sentence1 sentence2 --output_dir outputs/mrpc
    accelerate launch text_classification.py configs/sst2_minilm.yaml --learning_rate 3e-5

Any classifier of `AutoModelForSequenceClassification`, encoder or decoder, pretrained or with random weights; any data
set of one or two columns of text that `datasets.load_dataset` reads. Killed and started again with the same command it
resumes from its last checkpoint. Copy this file and change it: it needs no other.
"""

import inspect
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerFast,
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
from hf_condlr.robustness.attacks import TextModel

logger = logging.getLogger("text_classification")
CALIBRATION_SAMPLES = 512  # training texts that init_weights and rank_allocation measure, where they depend on data
SPECIAL = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}


@dataclass
class TextArguments(DatasetArguments):
    """Texts: which, and how much of them."""

    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One or two; by default the only column of text."}
    )
    label_column: str | None = field(default=None, metadata={"help": "By default the class labels, label or labels."})
    max_length: int | None = field(
        default=None, metadata={"help": "Cut texts to this many tokens; by default to what the model takes."}
    )


def load_data(args: TextArguments) -> DatasetDict:
    """Splits train, validation and perhaps test of the columns text, perhaps text_pair, labels and source_row."""
    data = args.load()
    columns = data["train"].features
    known = any(isinstance(kind, ClassLabel) for kind in columns.values())

    def is_label(name: str, kind: Any) -> bool:
        return isinstance(kind, ClassLabel) if known else name in ("label", "labels")

    def is_text(name: str, kind: Any) -> bool:
        return getattr(kind, "dtype", None) in ("string", "large_string") and name != label

    label = find_column(columns, "label_column", args.label_column, is_label, "class labels")
    texts = args.text_columns or [find_column(columns, "text_columns", None, is_text, "text")]
    right = all(name in columns and is_text(name, columns[name]) for name in texts)
    if not right or not len(texts) == len(set(texts)) <= 2:
        raise ValueError(f"text_columns must be one or two of {', '.join(columns)} that hold text; received {texts}")
    names = dict(zip(texts, ("text", "text_pair"), strict=False))
    data = args.hold_out(labelled(data, label, names), "labels")
    return readable_rows(data, unreadable, skip=args.skip_unreadable)


def unreadable(row: dict[str, Any]) -> str | None:
    """The fault of a row, or None: csv reads an empty cell, NA and null as no text."""
    return "no text" if row["text"] is None or row.get("text_pair", "") is None else None


def encode(rows: Dataset, tokenizer: Any, split: str) -> Dataset:
    """Tokens and labels; longer texts are cut to the tokenizer's `model_max_length`, and a warning counts them."""
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]

    def tokens(batch: dict[str, list[str]]) -> dict[str, Any]:
        encoded = tokenizer(*(batch[name] for name in columns), truncation=True)
        cut = [bool(text.overflowing) for text in encoded.encodings or []]  # a slow tokenizer does not tell
        return {**encoded, "cut": cut or [False] * len(encoded["input_ids"])}

    encoded = rows.map(tokens, batched=True, remove_columns=columns, keep_in_memory=True, load_from_cache_file=False)
    empty = next((row for row, ids in zip(rows["source_row"], encoded["input_ids"], strict=True) if not ids), None)
    if empty is not None:
        raise ValueError(f"a text must have at least one token; received none in {empty}")
    if any(encoded["cut"]):
        numbers = (sum(encoded["cut"]), len(rows), split, tokenizer.model_max_length)
        logger.warning("%d of %d texts of the %s split are cut to %d tokens", *numbers)
    return encoded.remove_columns(["cut", "source_row"])


def build_tokenizer(args: ModelArguments, train: Dataset) -> Any:
    """The model's own tokenizer; for random weights one of byte pairs, trained on the texts: `<s> text </s>`."""
    if args.model_name_or_path is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # decoders have none
        if tokenizer.pad_token is None:
            raise ValueError("a tokenizer must have a token for padding or for the end of a text; received neither")
        tokenizer.padding_side = "right"  # on the left, positions of GPT-2 would begin in the padding
        return tokenizer
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [text for name in ("text", "text_pair") if name in train.column_names for text in train[name]]
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": list(SPECIAL.values())}
    config = args.config()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=config.vocab_size, show_progress=False, **options)
    )
    frame = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    single, pair = "<s> $A </s>", "<s> $A </s> $B:1 </s>:1"
    backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=frame)
    segments = ["token_type_ids"] if getattr(config, "type_vocab_size", 1) > 1 else []
    names = SPECIAL | {"bos_token": "<s>", "eos_token": "</s>"}
    inputs = ["input_ids", *segments, "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names)


def config_changes(args: ModelArguments, tokenizer: Any, names: list[str]) -> dict[str, Any]:
    """Fields of the config for the classes and, for random weights, for the tokenizer."""
    changes = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if args.model_type is not None:
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "cls", "sep")}
        config = args.config()
        changes |= {"vocab_size": len(tokenizer)} | {name: i for name, i in ids.items() if hasattr(config, name)}
    return changes


def fit(tokenizer: Any, model: PreTrainedModel, max_length: int | None, pairs: bool) -> None:
    """Make tokenizer and model agree on padding, inputs and lengths, or say why they do not."""
    for config in (model.config, model.config.get_text_config()):  # decoders find the last token of a text by it
        config.pad_token_id = tokenizer.pad_token_id
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(f"tokens must lie in the model's vocabulary of {rows}; received {len(tokenizer)}")
    if pairs and tokenizer.num_special_tokens_to_add(pair=True) <= tokenizer.num_special_tokens_to_add(pair=False):
        remedy = "Join the two columns into one, or take an encoder such as BERT."
        raise ValueError(
            f"pairs need a tokenizer that separates two texts; received {type(tokenizer).__name__}. {remedy}"
        )
    taken = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in taken]
    most = TextModel(model, tokenizer).max_length  # of the tokenizer, and the positions of the model
    if most is None and max_length is None:
        raise ValueError("max_length must be given where neither model nor tokenizer has one; received None")
    if max_length is not None and not 3 <= max_length <= (most or max_length):
        raise ValueError(f"max_length must lie in [3, {most}], what the model takes; received {max_length}")
    tokenizer.model_max_length = max_length or most


def build_teacher(name: str | None, model: PreTrainedModel, tokenizer: Any) -> dict[str, PreTrainedModel]:
    """The dense model to distil from, which must have the same classes in the same order and the same tokens."""
    if name is None:
        return {}
    teacher, own = AutoModelForSequenceClassification.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    if teacher.config.id2label != model.config.id2label:
        known, wanted = list(teacher.config.label2id)[:5], list(model.config.label2id)[:5]
        raise ValueError(f"the teacher must know the classes {wanted}, ... in this order; received {known}, ...")
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"teacher and student must have the same tokens; received {len(own)} and {len(tokenizer)}")
    return {"teacher": teacher}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of correct classes; `evaluate.load("accuracy")` would need the network."""
    scores = prediction.predictions  # (N, classes); BART and T5 give hidden states after it
    scores = scores[0] if isinstance(scores, tuple) else scores
    metric = RobustAccuracy(keep_in_memory=True)  # a metric of `evaluate`; without an attack it is the accuracy
    found = metric.compute(predictions=scores.argmax(-1), references=prediction.label_ids)
    return {"accuracy": found["robust_accuracy"]}


def main(
    model_args: ModelArguments,
    data_args: TextArguments,
    attack_args: AttackArguments,
    training_args: CondLRTrainingArguments,
) -> None:
    """Train, save, evaluate, attack."""
    attack_args.make_attacks("tokens", "texts")
    model_args.require_task(AutoModelForSequenceClassification)
    training_args.dataloader_pin_memory &= torch.accelerator.is_available()

    with training_args.main_process_first():  # the others find the data in the cache
        data = load_data(data_args)
    checkpoint = checkpoint_to_resume(training_args, model_args, data_args)

    # Model
    set_seed(training_args.seed)  # of random weights, or of a new head
    tokenizer = build_tokenizer(model_args, data["train"])
    data = model_args.align_labels(data)
    names = data["train"].features["labels"].names
    changes = config_changes(model_args, tokenizer, names)
    model = model_args.load_model(AutoModelForSequenceClassification, **changes)
    fit(tokenizer, model, data_args.max_length, pairs="text_pair" in data["train"].column_names)
    tokens = {split: encode(rows, tokenizer, split) for split, rows in data.items()}
    collator = DataCollatorWithPadding(tokenizer)

    # Conversion: each linear layer becomes U S Vᵀ
    if model_args.converts(model):
        config = model_args.condlr_config()
        calibration = tokens["train"].shuffle(seed=0).take(CALIBRATION_SAMPLES)
        loader = DataLoader(calibration, batch_size=32, collate_fn=collator)
        get_robust_lowrank_model(model, config, calibration_data=loader if config.needs_calibration_data else None)

    # Trainer
    trainer = trainer_class(model_args.method)(
        model=model,
        args=training_args,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        processing_class=tokenizer,
        data_collator=collator,
        compute_metrics=accuracy,
        **build_teacher(model_args.teacher, model, tokenizer),
    )
    attack_args.require_unsharded(trainer)
    train_and_save(trainer, checkpoint)

    # Evaluation and attacks
    trainer.save_metrics("eval", trainer.evaluate() | {"eval_samples": len(data["validation"])})
    split = "test" if "test" in data else "validation"
    metrics = trainer.evaluate(tokens[split], metric_key_prefix=split) | {f"{split}_samples": len(data[split])}
    attacked, report = attack_args.evaluate(trainer, data[split].remove_columns("source_row"), split)
    write_results(trainer, split, metrics | attacked, report=report, dataset=data_args.hub_name)


if __name__ == "__main__":
    options = (ModelArguments, TextArguments, AttackArguments, CondLRTrainingArguments)
    main(*ScriptParser(options, description=__doc__.splitlines()[0]).parse())
