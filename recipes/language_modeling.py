r"""Fine-tune a causal language model dense, at low rank, or at low rank with bounded condition numbers.

    accelerate launch recipes/language_modeling.py recipes/configs/docstrings_language.yaml
    accelerate launch recipes/language_modeling.py --model_name_or_path gpt2 --dataset_name wikitext \
        --dataset_config_name wikitext-2-raw-v1 --compression_ratio 0.4 --init_weights activation_aware --tau 1 \
        --learning_rate 1e-4 --output_dir outputs/gpt2

One method a run, each with a learning rate of its own; `results_table.py` puts runs side by side:

    for method in dense lowrank condlr; do accelerate launch recipes/language_modeling.py \
        --method $method --output_dir outputs/lm/$method; done
    python recipes/results_table.py outputs/lm/*

Says the perplexity before training (of a dense method's run: the model's own; of the others': after compression) and
after it, and writes a sample. Killed and started again with the same command it goes on from its last checkpoint. A
YAML or JSON file holds the same names as the command line.

To change it, copy this file and those beside it that it and they import: `command_line.py`, `data_splits.py`,
`docstrings.py`, `fresh_tokenizer.py`, `labelled_data.py`, `text_data.py`, `language_data.py`, `method.py`,
`text_model.py`, `language_model.py`, `trainers.py`, `restart.py`, `running.py`.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from command_line import parse as parse_into
from command_line import require, require_joined
from datasets import DatasetDict
from labelled_data import card_name
from language_data import DataArguments, load_data, pack
from language_model import TRAINERS, ModelArguments, build_model, build_teacher, build_tokenizer, positions
from method import say_ignored
from restart import checkpoint_to_resume
from running import finish, prepare, settings, train
from transformers import Trainer, default_data_collator, set_seed

from hf_condlr import CondLRTrainingArguments

ARGUMENTS = (ModelArguments, DataArguments, CondLRTrainingArguments)
PROMPT_WORDS = 8


def make_trainer(
    model_args: ModelArguments, data_args: DataArguments, training_args: CondLRTrainingArguments, data: DatasetDict
) -> tuple[Trainer, DatasetDict]:
    """The method's Trainer, before training, and each split in blocks."""
    set_seed(training_args.seed)  # of a fresh model
    tokenizer = build_tokenizer(model_args, data["train"])
    model, block_size = build_model(model_args, data["train"], tokenizer, data_args.block_size)
    most, new = positions(model), data_args.max_new_tokens
    rule = f"max_new_tokens must be < {most}, the model's positions, of which the prompt takes one or more"
    require(most is None or new < most, rule, new, "Lower it; 0: no sample.")
    teacher = build_teacher(model_args, tokenizer)
    blocks = DatasetDict({split: pack(rows, tokenizer, block_size, split) for split, rows in data.items()})
    say_ignored(model_args, training_args)
    prepare(training_args)
    trainer = TRAINERS[model_args.method](
        model=model,
        args=training_args,
        train_dataset=blocks["train"],
        eval_dataset=blocks["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        **({} if teacher is None else {"teacher": teacher}),
    )
    return trainer, blocks


def at_start(trainer: Trainer) -> dict[str, float]:
    """What was evaluated before the first step; nothing where training went on from a checkpoint of another kind."""
    history = trainer.state.log_history
    measured = next((entry for entry in history if entry["step"] == 0 and "eval_perplexity" in entry), {})
    return {name.replace("eval_", "start_"): value for name, value in measured.items() if name.startswith("eval_")}


@torch.no_grad()
def generate(trainer: Trainer, prompt: str, new_tokens: int) -> str:
    """The prompt and what the model goes on with, drawn with the training's seed.

    Every process must call it, for a sharded model gathers its weights on each step; all draw the same.
    """
    set_seed(trainer.args.seed)
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model).eval(), trainer.processing_class
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    most = positions(model)
    if most is not None:
        ids = ids[:, new_tokens - most :]
    options = {"do_sample": True, "top_k": 50, "pad_token_id": tokenizer.eos_token_id}
    drawn = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, **options)
    return tokenizer.decode(drawn[0], skip_special_tokens=True)


def write_sample(trainer: Trainer, prompt: str, new_tokens: int) -> None:
    """`sample.txt`, by the first process; nothing for no new tokens."""
    if not new_tokens:
        return
    sample = generate(trainer, prompt, new_tokens)
    if trainer.is_world_process_zero():
        Path(trainer.args.output_dir, "sample.txt").write_text(sample + "\n", encoding="utf-8")
        print(f"sample: {sample}")


def main(model_args: ModelArguments, data_args: DataArguments, training_args: CondLRTrainingArguments) -> None:
    """Evaluate, train, evaluate, write a sample; write metrics and model."""
    require_joined(training_args.world_size)
    attack, remedy = training_args.adversarial_attack, "Leave it out: only classifiers are trained on attacks."
    require(attack == "none", "adversarial_attack must be none for a language model", attack, remedy)
    data = load_data(data_args)
    checkpoint = checkpoint_to_resume(training_args, settings(model_args, data_args, training_args))
    training_args.eval_on_start = checkpoint is None  # Trainer.evaluate() before train() would keep DDP from working
    trainer, blocks = make_trainer(model_args, data_args, training_args, data)
    train(trainer, checkpoint)
    trainer.save_metrics("start", at_start(trainer))
    trainer.save_metrics("eval", trainer.evaluate() | {"eval_samples": len(blocks["validation"])})

    split = "test" if "test" in data else "validation"
    metrics = trainer.evaluate(blocks[split], metric_key_prefix=split)
    metrics |= {f"{split}_samples": len(blocks[split]), f"{split}_tokens": sum(map(len, blocks[split]["input_ids"]))}
    prompt = data_args.prompt or " ".join(data[split]["text"][0].split()[:PROMPT_WORDS])
    sample = partial(write_sample, trainer, prompt, data_args.max_new_tokens)
    finish(trainer, split, metrics, dataset=card_name(data_args.dataset_name), further=sample)


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, CondLRTrainingArguments]:
    """Of the command line; mistakes in one line."""
    return parse_into(ARGUMENTS, argv, __doc__.splitlines()[0])


if __name__ == "__main__":
    main(*parse(sys.argv[1:]))
