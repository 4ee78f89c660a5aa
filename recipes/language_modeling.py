r"""Fine-tune a causal language model dense, at low rank, or at low rank with bounded condition numbers.

    accelerate launch language_modeling.py --model_name_or_path gpt2 --dataset_name wikitext \
        --dataset_config_name wikitext-2-raw-v1 --compression_ratio 0.4 --init_weights activation_aware --tau 1 \
        --learning_rate 1e-4 --output_dir outputs/gpt2
    accelerate launch language_modeling.py configs/docstrings_language.yaml

Reports the perplexity before training (of a low-rank model: after its compression) and after it. Any model of
`AutoModelForCausalLM`, pretrained or with random weights; any data set with a column of text that
`datasets.load_dataset` reads, or .txt files. Killed and started again with the same command it resumes from its last
checkpoint. Copy this file and change it: it needs no other.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    default_data_collator,
    set_seed,
)

from hf_condlr import (
    CondLRTrainingArguments,
    DatasetArguments,
    ModelArguments,
    ScriptParser,
    checkpoint_to_resume,
    find_column,
    get_robust_lowrank_model,
    pack_texts,
    readable_rows,
    train_and_save,
    trainer_class,
    write_results,
)

BLOCK_SIZE = 1024  # at most, where the model takes more
CALIBRATION_SAMPLES = 512  # training blocks that init_weights and rank_allocation measure, where they depend on data


@dataclass
class TextArguments(DatasetArguments):
    """Texts: which, and how much of them."""

    text_column: str | None = field(default=None, metadata={"help": "By default the only column of text."})
    block_size: int | None = field(
        default=None,
        metadata={"help": f"Tokens of a training sample; by default what the model takes, {BLOCK_SIZE} at most."},
    )


def load_data(args: TextArguments) -> DatasetDict:
    """Splits train, validation and perhaps test of the columns text and source_row; empty texts are left out."""

    def is_text(name: str, kind: Any) -> bool:
        return getattr(kind, "dtype", None) in ("string", "large_string")

    data = args.load()
    columns = data["train"].features
    name = find_column(columns, "text_column", args.text_column, is_text, "text")
    if not is_text(name, columns[name]):
        raise ValueError(f"text_column must hold text; received {name}, of {columns[name]}")
    data = data.select_columns([name, "source_row"])
    if name != "text":
        data = data.rename_column(name, "text")
    data = readable_rows(data, lambda row: "no text" if row["text"] is None else None, skip=args.skip_unreadable)
    data = data.filter(lambda row: bool(row["text"].strip()))
    empty = [split for split, rows in data.items() if not len(rows)]
    if empty:
        raise ValueError(f"a split must hold text; received none in {', '.join(empty)}")
    return args.hold_out(data)


def build_tokenizer(args: ModelArguments, train: Dataset) -> Any:
    """The model's own tokenizer; for random weights one of byte pairs, trained on the training texts."""
    if args.model_name_or_path is not None:
        return AutoTokenizer.from_pretrained(args.model_name_or_path)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": ["<s>", "</s>"]}
    size = args.config().vocab_size
    backend.train_from_iterator(train["text"], trainers.BpeTrainer(vocab_size=size, show_progress=False, **options))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def load_model(args: ModelArguments, tokenizer: Any) -> PreTrainedModel:
    """The model before its layers are factored; with random weights its config describes the tokenizer."""
    fresh = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = args.load_model(AutoModelForCausalLM, **(fresh if args.model_type is not None else {}))
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(f"tokens must lie in the model's vocabulary of {rows}; received {len(tokenizer)}")
    return model


def choose_block_size(asked: int | None, model: PreTrainedModel) -> int:
    """The block size that is asked for, or else the model's limit, up to BLOCK_SIZE."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if asked is not None and not 2 <= asked <= (most or asked):
        raise ValueError(f"block_size must lie in [2, {most}], the model's positions; received {asked}")
    return asked or min(most or BLOCK_SIZE, BLOCK_SIZE)


def build_teacher(name: str | None, tokenizer: Any) -> dict[str, PreTrainedModel]:
    """The dense model to distil from, which must have the same tokens."""
    if name is None:
        return {}
    own = AutoTokenizer.from_pretrained(name)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"teacher and student must have the same tokens; received {len(own)} and {len(tokenizer)}")
    return {"teacher": AutoModelForCausalLM.from_pretrained(name)}


def block_losses(logits: Any, labels: torch.Tensor) -> torch.Tensor:  # (B, T, vocabulary), (B, T) -> (B,)
    """Mean loss of each block, in the place of logits, which would fill the memory."""
    logits, targets = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1], labels[:, 1:]
    losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return losses.reshape(targets.shape).mean(1)


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """Perplexity over all blocks, each counted once: Trainer's mean loss counts some twice with several processes."""
    return {"perplexity": math.exp(min(float(prediction.predictions.mean()), 700.0))}  # more is no float


def at_start(trainer: Trainer) -> dict[str, float]:
    """Loss and perplexity before the first step, which a checkpoint keeps, too."""
    history = trainer.state.log_history
    first = next((entry for entry in history if entry["step"] == 0 and "eval_perplexity" in entry), {})
    return {f"start_{name}": first[f"eval_{name}"] for name in ("loss", "perplexity") if first}


def main(model_args: ModelArguments, data_args: TextArguments, training_args: CondLRTrainingArguments) -> None:
    """Evaluate, train, save, evaluate."""
    model_args.require_task(AutoModelForCausalLM)
    if training_args.adversarial_attack != "none":
        raise ValueError(f"only classifiers are trained on attacks; received {training_args.adversarial_attack}")
    training_args.dataloader_pin_memory &= torch.accelerator.is_available()

    with training_args.main_process_first():  # the others find the data in the cache
        data = load_data(data_args)
    checkpoint = checkpoint_to_resume(training_args, model_args, data_args)
    training_args.eval_on_start = checkpoint is None

    # Model
    set_seed(training_args.seed)  # of random weights
    tokenizer = build_tokenizer(model_args, data["train"])
    model = load_model(model_args, tokenizer)
    block_size = choose_block_size(data_args.block_size, model)
    blocks = {split: pack_texts(rows, tokenizer, block_size, split) for split, rows in data.items()}

    # Conversion: each linear layer becomes U S Vᵀ; embeddings that are also the output layer stay dense and tied
    if model_args.converts(model):
        config = model_args.condlr_config()
        calibration = blocks["train"].shuffle(seed=0).take(CALIBRATION_SAMPLES)
        loader = DataLoader(calibration, batch_size=8, collate_fn=default_data_collator)
        get_robust_lowrank_model(model, config, calibration_data=loader if config.needs_calibration_data else None)

    # Trainer
    trainer = trainer_class(model_args.method)(
        model=model,
        args=training_args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=perplexity,
        preprocess_logits_for_metrics=block_losses,
        **build_teacher(model_args.teacher, tokenizer),
    )
    train_and_save(trainer, checkpoint)

    # Evaluation
    trainer.save_metrics("start", at_start(trainer))
    trainer.save_metrics("eval", trainer.evaluate() | {"eval_samples": len(blocks["validation"])})
    split = "test" if "test" in data else "validation"
    sizes = {f"{split}_samples": len(blocks[split]), f"{split}_tokens": len(blocks[split]) * block_size}
    metrics = trainer.evaluate(blocks[split], metric_key_prefix=split)
    write_results(trainer, split, metrics | sizes, dataset=data_args.hub_name)


if __name__ == "__main__":
    options = (ModelArguments, TextArguments, CondLRTrainingArguments)
    main(*ScriptParser(options, description=__doc__.splitlines()[0]).parse())
