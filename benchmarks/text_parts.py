"""A pretrained text encoder on SST-2: the settings that `text_study.py` compares, their models and their trainings."""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from record import digest
from rows import Rows
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    set_seed,
)

from hf_condlr import CondLRConfig, CondLRTrainer, CondLRTrainingArguments, condition_report, get_robust_lowrank_model
from hf_condlr.robustness.attacks import Attack, CharacterAttack, EmbeddingPGD
from hf_condlr.robustness.evaluation import evaluate_robustness

logger = logging.getLogger("text_study")
ENCODER = r".*encoder\.layer\..*"
ATTENTION = r".*\.attention\..*"


@dataclass(frozen=True)
class Row:
    """One setting: what is trained, from where, and how."""

    dense: bool = False
    unconstrained: bool = False
    """U, S, V train freely, without the manifold step."""
    compression_ratio: float = 0.6
    start: str = "fisher"
    allocation: str = "fisher"
    tau: float = 0.1
    attention_tau: float | None = None
    """τ of the attention's layers, where it is another one than that of the MLPs."""
    center: str = "nearest"
    conditioned: bool = False
    """The start obeys the bound."""
    warmup: float = 0.3
    core_learning_rate: float = 1.0
    factor_learning_rate: float = 1.0
    distillation: float = 0.0
    """λ; the teacher is the dense model that was fine-tuned."""
    adversarial: float = 0.0
    """ε of FGM on half of each batch."""
    fine_tuned: bool = True
    """Compress the fine-tuned model, or the pretrained one with a classifier drawn at random."""
    fine_tuned_adversarial: float = 0.0
    """ε of FGM on half of each batch of the fine-tuning, before compression."""
    trained: bool = True
    """False: as compressed, with κ brought to its bound."""


@dataclass
class TrainingOptions:
    """Trainings of the study."""

    model_path: str = field(
        metadata={"help": "Folder of all-MiniLM-L6-v2, or of another encoder with `encoder.layer`."}
    )
    steps: int = field(default=150, metadata={"help": "Optimizer steps after compression."})
    dense_steps: int = field(default=432, metadata={"help": "Optimizer steps of fine-tuning before it; an epoch."})
    dense_learning_rates: list[float] = field(
        default_factory=lambda: [1e-4], metadata={"help": "Of the fine-tuning; the first seed chooses."}
    )
    batch_size: int = field(default=16, metadata={"help": "Sentences a step."})
    max_length: int = field(default=32, metadata={"help": "Tokens a sentence, the rest cut off."})
    dropout: bool = field(default=True, metadata={"help": "Off, a student sees what its teacher saw."})
    attacked: int = field(default=256, metadata={"help": "Test sentences that attacks see, drawn once."})
    attack_steps: int = field(default=10, metadata={"help": "Of PGD on the embeddings."})
    epsilons: list[float] = field(default_factory=lambda: [0.02, 0.05], metadata={"help": "Of PGD on the embeddings."})
    characters: list[float] = field(default_factory=lambda: [0.1], metadata={"help": "Shares of the words; of seed 0."})
    calibration_sentences: int = field(default=512, metadata={"help": "Training sentences that starts and ranks see."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    output_dir: str = field(default="outputs/text_study", metadata={"help": "Rows, models and results go here."})


class Experiment:
    """Data, models and finished rows."""

    def __init__(self, options: TrainingOptions, first_seed: int = 0) -> None:
        self.options, self.first_seed = options, first_seed
        self.folder = Path(options.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = Rows(self.folder / "rows.jsonl")
        self.tokenizer = AutoTokenizer.from_pretrained(options.model_path)
        self.raw = load_dataset(str(Path(os.environ.get("CONDLR_DATA", "../shared/data")) / "sst2"))

        def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
            return self.tokenizer(batch["sentence"], truncation=True, max_length=options.max_length)

        self.data = self.raw.map(tokenize, batched=True, remove_columns=["sentence"])
        for split in ("validation", "test"):  # alike lengths side by side: less padding
            lengths = [len(ids) for ids in self.data[split]["input_ids"]]
            self.data[split] = self.data[split].select(np.argsort(lengths, kind="stable"))
        self.collator = DataCollatorWithPadding(self.tokenizer)

    # ------------------------------------------------------------------------------------------------- models

    def dense_model(self, path: str | Path | None = None) -> Any:
        """The pretrained encoder with a fresh classifier, or a fine-tuned one."""
        return AutoModelForSequenceClassification.from_pretrained(path or self.options.model_path, num_labels=2)

    def fine_tuned(self, seed: int, adversarial: float = 0.0) -> Path:
        """Where the dense model of a seed lies, trained at the rate that the first seed's validation accuracy chose."""
        rates = sorted(self.options.dense_learning_rates)
        best = rates[0]
        if len(rates) > 1:
            best = max(rates, key=lambda rate: self._fine_tune(rate, self.first_seed, adversarial)["validation"])
        return self.folder / self._fine_tune(best, seed, adversarial)["model"]

    def _fine_tune(self, rate: float, seed: int, adversarial: float) -> dict[str, Any]:
        o = self.options
        key = {"fine_tuning": rate, "seed": seed, "steps": o.dense_steps, "batch_size": o.batch_size}
        key |= {"max_length": o.max_length} | ({"adversarial": adversarial} if adversarial else {})
        if found := self.rows.find(key):
            return found
        set_seed(seed)
        model, folder = self.dense_model(), self.folder / "models" / f"dense-{digest(key)}"
        trainer = self.trainer(model, Row(dense=True, adversarial=adversarial), rate, seed, o.dense_steps)
        trainer.train()
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        accuracy = trainer.evaluate(self.data["validation"])["eval_accuracy"]
        logger.info("fine-tuned, lr=%g seed=%d: %s", rate, seed, accuracy)
        return self.rows.add(key, {"validation": accuracy, "model": str(folder.relative_to(self.folder))})

    @functools.cache  # noqa: B019  (one experiment a process)
    def converted(self, row: Row, seed: int) -> Any:
        """The converted model; calibrated on training sentences where start or ranks ask for it."""
        patterns = {} if row.attention_tau is None else {ATTENTION: row.attention_tau}
        config = CondLRConfig(
            target_modules=ENCODER,
            compression_ratio=row.compression_ratio,
            rank_allocation=row.allocation,
            init_weights=row.start,
            tau=row.tau,
            tau_pattern=patterns,
            center=row.center,
            conditioned_start=row.conditioned,
        )
        calibration = None
        if "fisher" in (row.start, row.allocation) or row.start == "activation_aware":
            rows = self.data["train"].shuffle(seed=0).select(range(self.options.calibration_sentences))
            calibration = torch.utils.data.DataLoader(rows, batch_size=32, collate_fn=self.collator)
        model = self._start(row, seed)
        return get_robust_lowrank_model(model, config, calibration_data=calibration)

    def _start(self, row: Row, seed: int) -> Any:
        return self.dense_model(self.fine_tuned(seed, row.fine_tuned_adversarial) if row.fine_tuned else None)

    def build(self, row: Row, seed: int) -> Any:
        """A copy of the converted model; a classifier that was not fine-tuned is drawn as the dense model's is."""
        if row.dense:
            return self._start(row, seed)
        fields = (
            "compression_ratio",
            "start",
            "allocation",
            "tau",
            "attention_tau",
            "center",
            "conditioned",
            "fine_tuned",
            "fine_tuned_adversarial",
        )
        settings = {name: getattr(row, name) for name in fields}  # trainings that differ elsewhere share it
        model = copy.deepcopy(self.converted(Row(**settings), seed))
        if not row.fine_tuned:
            model.classifier.load_state_dict(self.dense_model().classifier.state_dict())
        return model

    # ---------------------------------------------------------------------------------------------- trainings

    def train(self, name: str, row: Row, learning_rate: float, seed: int) -> dict[str, Any]:
        """One training: validation accuracy, size, condition, time; the model is kept, to be tested and attacked."""
        o = self.options
        settings = {"steps": o.steps, "batch_size": o.batch_size, "max_length": o.max_length, "dropout": o.dropout}
        before = {"dense_steps": o.dense_steps} if row.fine_tuned or row.distillation else {}
        values = {k: "inf" if v == math.inf else v for k, v in asdict(row).items()}
        values = {k: v for k, v in values.items() if v or k != "fine_tuned_adversarial"}
        key = values | settings | before | {"learning_rate": learning_rate, "seed": seed}
        folder = self.folder / "models" / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{digest(key)}"
        if (found := self.rows.find(key)) and folder.is_dir():
            return found
        model = self.build(row, seed)
        set_seed(seed)
        steps = o.steps if row.trained else 1
        trainer = self.trainer(model, row, learning_rate if row.trained else 0.0, seed, steps)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        accuracy = trainer.evaluate(self.data["validation"])["eval_accuracy"]
        result: dict[str, Any] = {"name": name, "validation": accuracy, "seconds": round(seconds, 1)}
        if not row.dense:
            report = condition_report(model)
            kappa = report.max_condition_number
            result |= {"largest_kappa": kappa if math.isfinite(kappa) else None, "parameters": report.parameters}
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        logger.info("%s lr=%g seed=%d: %s", name, learning_rate, seed, result)
        return self.rows.add(key, result | {"model": str(folder.relative_to(self.folder))})

    def trainer(self, model: Any, row: Row, learning_rate: float, seed: int, steps: int) -> Trainer:
        """The Trainer of the library; without factors, or without their step, it trains like transformers' own."""
        o = self.options
        if not o.dropout:
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
        args = CondLRTrainingArguments(
            output_dir=str(Path(tempfile.gettempdir(), "text_study")),
            max_steps=steps,
            learning_rate=learning_rate,
            seed=seed,
            per_device_train_batch_size=o.batch_size,
            per_device_eval_batch_size=64,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            weight_decay=0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            conditioning_warmup_ratio=row.warmup if row.trained else 0.0,
            distillation_weight=row.distillation,
            core_learning_rate=row.core_learning_rate,
            factor_learning_rate=row.factor_learning_rate,
            **({"adversarial_attack": "fgsm", "adversarial_epsilon": row.adversarial} if row.adversarial else {}),
            **({"adversarial_share": 0.5, "adversarial_schedule": "constant"} if row.adversarial else {}),
        )
        trainer_class = FreeTrainer if row.unconstrained or row.dense else CondLRTrainer
        teacher = self.dense_model(self.fine_tuned(seed)) if row.distillation else None
        return trainer_class(
            model=model,
            args=args,
            train_dataset=self.data["train"],
            data_collator=self.collator,
            processing_class=self.tokenizer,
            teacher=teacher,
            compute_metrics=lambda output: {"accuracy": float((np.argmax(output[0], -1) == output[1]).mean())},
        )

    # --------------------------------------------------------------------------------------- test and attacks

    def tested(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with `test`, accuracy on all test sentences, and `robust`, {attack: accuracy} on some of them.

        The same ones for all models; done once for each.
        """
        o = self.options
        attacks: list[Attack] = [EmbeddingPGD(epsilon, steps=o.attack_steps) for epsilon in o.epsilons]
        attacks += [CharacterAttack(share) for share in o.characters] if row["key"]["seed"] == self.first_seed else []
        key = {"attacked": row["key"], "samples": o.attacked, "attacks": [attack.settings() for attack in attacks]}
        found = self.rows.find(key)
        if found is None:
            model = self.dense_model(self.folder / row["model"])
            clean = self.trainer(model, Row(dense=True), 0.0, 0, 1).evaluate(self.data["test"])["eval_accuracy"]
            report = evaluate_robustness(
                model.eval(),
                self.raw["test"],
                attacks,
                processor=self.tokenizer,
                max_samples=o.attacked,
                checks=False,
                progress=False,
            )
            accuracies = {f"{a.name} {a.epsilon:g}": a.robust_accuracy for a in report.attacks}
            logger.info("%s seed=%d: test %.3f, %s", row["name"], row["key"]["seed"], clean, accuracies)
            found = self.rows.add(key, {"test": clean, "robust": accuracies})
        return row | {"test": found["test"], "robust": found["robust"]}


class FreeTrainer(CondLRTrainer):
    """The same training without the manifold step: unconstrained U, S, V."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's own."""
        return Trainer.create_optimizer(self, *(() if model is None else (model,)))


def chosen(
    experiment: Experiment, name: str, row: Row, rates: Iterable[float], seeds: list[int]
) -> list[dict[str, Any]]:
    """The trainings of every seed at the rate of the best validation accuracy of the first one."""
    rates = sorted(rates) if row.trained else [0.0]
    sweep = {rate: experiment.train(name, row, rate, seeds[0])["validation"] for rate in rates}
    best = max(rates, key=sweep.__getitem__)
    return [experiment.train(name, row, best, seed) for seed in seeds]
