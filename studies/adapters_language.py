r"""SmolLM2 on film reviews by adapters: the methods of `studies.adapters`, and what the model forgets meanwhile.

The frozen language model gets adapters in every linear layer of its blocks and is trained on reviews (SST-2).
Perplexity is measured on other reviews, and on docstrings, of which training has nothing. The validation loss chooses
the rate.

    CONDLR_DATA=path/to/data python -m studies.adapters_language --model_path path/to/smollm2-135m
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup, set_seed

from benchmarks.memory import peak_of
from hf_condlr import CondLRAdapterConfig, attach_manifold_step
from hf_condlr.options import option
from hf_condlr.tables import markdown_table
from studies.adapters import METHODS, Method, update_condition_numbers
from studies.language_texts import blocks, docstrings, reviews
from studies.record import parse, set_up, write_record
from studies.rows import Rows, sweep


@dataclass
class Options:
    """What is compared."""

    model_path: str = field(metadata={"help": "Folder of a causal language model and its tokenizer."})
    output_dir: str = option("outputs/adapters_language", "Folder for the rows.")
    data_dir: str | None = option(None, "Folder that holds sst2; by default CONDLR_DATA.")
    rows: list[str] = option(["LoRA", "PiSSA", "τ = 0.1", "τ = 1", "τ = 4", "τ = ∞"], f"Of: {'; '.join(METHODS)}.")
    r: int = option(8, "Rank of every adapter.")
    steps: int = option(40, "Optimizer steps.")
    batch_size: int = option(4, "Blocks of 256 tokens a step.")
    held_out_blocks: int = option(8, "Blocks of each kind of text to measure on.")
    learning_rates: list[float] = option([1e-3, 3e-3], "The sweep, the same for every row.")
    threads: int | None = option(None, "Threads of torch; by default its own choice.")


class Experiment:
    """The texts and the finished rows."""

    def __init__(self, options: Options) -> None:
        self.options, self.rows = options, Rows(Path(options.output_dir) / "rows")
        self.tokenizer = AutoTokenizer.from_pretrained(options.model_path)
        held_out, data_dir = options.held_out_blocks, options.data_dir
        self.train_blocks = blocks(reviews("train", data_dir), self.tokenizer, options.steps * options.batch_size)
        self.validation = blocks(reviews("validation", data_dir), self.tokenizer, held_out)
        self.test_texts = {
            "reviews": blocks(reviews("test", data_dir), self.tokenizer, held_out),
            "docstrings": blocks(docstrings("scipy", "networkx"), self.tokenizer, held_out),
        }

    def adapted(self, method: Method, seed: int) -> Any:
        """The frozen model with adapters in the linear layers of its blocks."""
        set_seed(seed)
        common: dict[str, Any] = {"r": self.options.r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        if method.tau is None:
            config: Any = LoraConfig(lora_alpha=self.options.r, init_lora_weights=method.lora, **common)
        else:
            config = CondLRAdapterConfig(tau=method.tau, **common)
        model = AutoModelForCausalLM.from_pretrained(self.options.model_path, dtype=torch.float32)
        return get_peft_model(model, config)

    def train(self, method: Method, learning_rate: float, seed: int) -> dict[str, Any]:
        """The row of one training, with its perplexities on all texts."""
        o = self.options
        facts = {**asdict(method), "tau": str(method.tau), "learning_rate": learning_rate, "seed": seed}

        def make(folder: Path) -> dict[str, Any]:
            model = self.adapted(method, seed)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=0.0)
            scheduler = get_cosine_schedule_with_warmup(optimizer, o.steps // 10, o.steps)
            if method.tau is not None:
                attach_manifold_step(optimizer, model)

            def steps() -> None:
                for ids in self.train_blocks.split(o.batch_size):
                    model(input_ids=ids, labels=ids).loss.backward()
                    torch.nn.utils.clip_grad_norm_(trained, 1.0)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()

            began = time.process_time()
            peak = peak_of(steps, torch.device("cpu"))
            seconds = (time.process_time() - began) / o.steps
            loss = self.loss(model, self.validation)
            return {
                "label": method.name,
                **facts,
                "diverged": not math.isfinite(loss),
                "validation_accuracy": -loss,  # `sweep` takes the largest
                "perplexity": {kind: math.exp(self.loss(model, texts)) for kind, texts in self.test_texts.items()},
                "kappa_of_updates": update_condition_numbers(model),
                "parameters": sum(p.numel() for p in trained),
                "cpu_seconds_a_step": round(seconds, 3),
                "peak_bytes": peak,
            }

        key = facts | {name: getattr(o, name) for name in ("steps", "batch_size", "r", "held_out_blocks")}
        return self.rows.row(f"{method.name} lr {learning_rate:g}", key, make)

    @torch.no_grad()
    def loss(self, model: Any, texts: Tensor) -> float:  # (blocks, LENGTH)
        """Mean loss of a token, in nats."""
        return statistics.fmean(model(input_ids=ids[None], labels=ids[None]).loss.item() for ids in texts)


def table(rows: list[dict[str, Any]], dense: dict[str, float]) -> str:
    """A line for each method."""
    lines = [["not adapted", "", *(f"{value:.1f}" for value in dense.values()), "", "", "", "", ""]]
    for row in rows:
        kappas = [math.inf if value is None else value for value in row["kappa_of_updates"].values()]
        kappa = [f"{statistics.median(kappas):.4g}", f"{max(kappas):.4g}"]
        found = [f"{value:.1f}" for value in row["perplexity"].values()]
        peak = f"{row['peak_bytes'] / 1e9:.2f}" if row["peak_bytes"] else ""
        cost = [f"{row['cpu_seconds_a_step']:.2f}", peak, f"{row['parameters']:,}"]
        lines.append([row["label"], f"{row['learning_rate']:g}", *found, *kappa, *cost])
    header = ["method", "rate", *dense, "median κ(ΔW)", "largest κ(ΔW)", "CPU s a step", "peak GB", "trained"]
    return markdown_table(header, lines, align="lr")


def main() -> None:
    """Run what is missing, print the table, write the record."""
    (options,) = parse(Options)
    set_up(options.threads)
    experiment = Experiment(options)
    model = AutoModelForCausalLM.from_pretrained(options.model_path, dtype=torch.float32).eval()
    dense = {kind: math.exp(experiment.loss(model, texts)) for kind, texts in experiment.test_texts.items()}
    methods = [METHODS[name] for name in options.rows]
    # The test texts were measured in training; they choose nothing.
    results = sweep(methods, options.learning_rates, [0], train=experiment.train, test=lambda *row: {})
    print(table([row for row in results["rows"] if not row["diverged"]], dense))
    print("\nwrote", write_record(Path(options.output_dir) / "results.json", {"dense": dense, **results}, options))


if __name__ == "__main__":
    main()
