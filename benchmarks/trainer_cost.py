"""What the Trainer pays for the guarantee: CondLRTrainer over a plain Trainer on the same converted model.

A BERT of the shape of all-MiniLM-L6-v2 with random weights and random tokens; blocks of steps of both, interleaved in
one process, so that a noisy machine meets both alike. Time is that of the training loop, callbacks included.

    python benchmarks/trainer_cost.py --batch_size 16 --tokens 32
    python benchmarks/trainer_cost.py --batch_size 32 --tokens 128
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from record import write_record
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, Trainer, set_seed
from transformers.utils import logging

from hf_condlr import CondLRConfig, CondLRTrainer, CondLRTrainingArguments, get_robust_lowrank_model


@dataclass
class Options:
    """The experiment."""

    compression_ratio: float = field(default=0.6, metadata={"help": "Share of the encoder's linear weights removed."})
    batch_size: int = field(default=16, metadata={"help": "Sentences a step."})
    tokens: int = field(default=32, metadata={"help": "Tokens of a sentence."})
    steps: int = field(default=5, metadata={"help": "Steps of a block."})
    blocks: int = field(default=6, metadata={"help": "Blocks of each trainer."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    output: str = field(default="outputs/trainer_cost.json", metadata={"help": "Where the record goes."})


def make(options: Options, trainer_class: type[Trainer], folder: str, factored: bool) -> Trainer:
    """A trainer of its own model."""
    set_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    model = BertForSequenceClassification(config)
    if factored:
        get_robust_lowrank_model(
            model, CondLRConfig(target_modules=r".*encoder\.layer.*", compression_ratio=options.compression_ratio)
        )
    rows = options.batch_size * options.steps
    tokens = torch.randint(0, config.vocab_size, (rows, options.tokens))
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": [i % 2 for i in range(rows)]}).with_format(
        "torch"
    )
    arguments: dict[str, Any] = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_strategy": "no"}
    args = CondLRTrainingArguments(
        output_dir=folder,
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size,
        conditioning_warmup_ratio=0.0,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=False,
        **arguments,
    )
    return trainer_class(model=model, args=args, train_dataset=data)


def block(trainer: Trainer) -> float:
    """Seconds of a step, averaged over one call of train()."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    trainer.train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / trainer.args.max_steps


def main() -> None:
    """Measure, print, write."""
    options: Options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]  # type: ignore[arg-type]
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            "dense, Trainer": make(options, Trainer, folder, factored=False),
            "factored, Trainer": make(options, Trainer, folder, factored=True),
            "factored, CondLRTrainer": make(options, CondLRTrainer, folder, factored=True),
        }
        for trainer in trainers.values():
            trainer.callback_handler.callbacks = []  # no printing
            block(trainer)
        times: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(options.blocks):
            for name, trainer in trainers.items():
                times[name].append(block(trainer))
    base = times["factored, Trainer"]
    lines = ["| model and trainer | ms a step | over factored, Trainer |", "|" + " --- |" * 3]
    for name, values in times.items():
        ratios = sorted(value / other for value, other in zip(values, base, strict=True))
        lines.append(
            f"| {name} | {1e3 * statistics.median(values):.0f} | "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |"
        )
    path = write_record(Path(options.output), {"seconds": times}, options)
    sys.stdout.write("\n".join(lines) + f"\n\nwrote {path}\n")


if __name__ == "__main__":
    main()
