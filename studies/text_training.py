"""A pretrained text encoder on SST-2: models and trainings of the settings that `text_study.py` compares."""

from __future__ import annotations

import copy
import functools
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    set_seed,
)

from hf_condlr import (
    CondLRConfig,
    CondLRTrainer,
    CondLRTrainingArguments,
    FactoredTrainer,
    get_robust_lowrank_model,
)
from hf_condlr.options import option
from hf_condlr.robustness.attacks import Attack, CharacterAttack, EmbeddingPGD
from studies.data import data_folder
from studies.paper.methods import condition_numbers
from studies.rows import Rows, attacked

ENCODER = r".*encoder\.layer\..*"


@dataclass(frozen=True)
class Setting:
    """What is trained, from where, and how.

    Attributes:
        name: In tables.
        dense: Nothing is compressed.
        unconstrained: U, S, V train freely, without the manifold step.
        compression_ratio: Share of the weights of the encoder's linear layers that is removed.
        start: `init_weights` of the config.
        allocation: `rank_allocation` of the config.
        tau: Conditioning tolerance.
        conditioned: Whether the start obeys the bound.
        warmup: Share of the training until τ is reached.
        distillation: Weight of the distillation; the teacher is the dense model that was fine-tuned.
        adversarial: ε of FGM on half of each batch; 0: none.
        fine_tuned: Compress the fine-tuned model, or the pretrained one with a classifier drawn at random.
        trained: Whether there is a training after compression; if not, κ is brought to its bound.
    """

    name: str = ""
    dense: bool = False
    unconstrained: bool = False
    compression_ratio: float = 0.6
    start: str = "fisher"
    allocation: str = "fisher"
    tau: float = 0.1
    conditioned: bool = False
    warmup: float = 0.3
    distillation: float = 0.0
    adversarial: float = 0.0
    fine_tuned: bool = True
    trained: bool = True


BATCH_SIZE = 16
MAX_LENGTH = 32  # tokens of a sentence, the rest is cut off
ATTACKS: list[Attack] = [EmbeddingPGD(epsilon, steps=10) for epsilon in (0.02, 0.05)]
SLOW_ATTACKS: list[Attack] = [CharacterAttack(0.1)]  # for the first seed only


@dataclass
class TrainingOptions:
    """Trainings of the study."""

    model_path: str = field(
        metadata={"help": "Folder of all-MiniLM-L6-v2, or of another encoder with `encoder.layer`."}
    )
    steps: int = option(150, "Optimizer steps after compression.")
    dense_steps: int = option(432, "Optimizer steps of fine-tuning before it; an epoch.")
    dense_learning_rate: float = option(1e-4, "Learning rate of the fine-tuning.")
    attacked: int = option(256, "Number of test sentences that are attacked, drawn once.")
    calibration_sentences: int = option(512, "Number of training sentences that starts and ranks use.")
    threads: int = option(1, "Threads of torch.")
    output_dir: str = option("outputs/text_study", "Rows, models and results go here.")


class Experiment:
    """Data, models and finished rows."""

    def __init__(self, options: TrainingOptions, first_seed: int = 0) -> None:
        self.options, self.first_seed = options, first_seed
        self.rows = Rows(Path(options.output_dir) / "rows")
        self.tokenizer = AutoTokenizer.from_pretrained(options.model_path)
        self.raw = load_dataset(data_folder("sst2"))

        def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
            return self.tokenizer(batch["sentence"], truncation=True, max_length=MAX_LENGTH)

        self.data = self.raw.map(tokenize, batched=True, remove_columns=["sentence"])
        for split in ("validation", "test"):  # similar lengths side by side: less padding
            lengths = [len(ids) for ids in self.data[split]["input_ids"]]
            self.data[split] = self.data[split].select(np.argsort(lengths, kind="stable"))
        self.collator = DataCollatorWithPadding(self.tokenizer)

    # ------------------------------------------------------------------------------------------------- models

    def dense_model(self, path: str | Path | None = None) -> Any:
        """The pretrained encoder with a fresh classifier, or the model in `path`."""
        return AutoModelForSequenceClassification.from_pretrained(path or self.options.model_path, num_labels=2)

    def fine_tuned(self, seed: int) -> str:
        """Folder of the dense model that is fine-tuned with this seed."""
        o = self.options
        key = {"rate": o.dense_learning_rate, "seed": seed, "steps": o.dense_steps}

        def make(folder: Path) -> dict[str, Any]:
            set_seed(seed)
            model = self.dense_model()
            return self._train(model, Setting(dense=True), o.dense_learning_rate, seed, o.dense_steps, folder)

        return self.rows.row(f"fine-tuned seed {seed}", key, make)["folder"]

    def _start(self, setting: Setting, seed: int) -> Any:
        return self.dense_model(self.fine_tuned(seed) if setting.fine_tuned else None)

    @functools.cache  # noqa: B019  (one experiment a process)
    def _converted(self, setting: Setting, seed: int) -> Any:
        """The converted model; calibrated on training sentences where start or ranks ask for it."""
        config = CondLRConfig(
            target_modules=ENCODER,
            compression_ratio=setting.compression_ratio,
            rank_allocation=setting.allocation,
            init_weights=setting.start,
            tau=setting.tau,
            conditioned_start=setting.conditioned,
        )
        calibration = None
        if "fisher" in (setting.start, setting.allocation) or setting.start == "activation_aware":
            rows = self.data["train"].shuffle(seed=0).select(range(self.options.calibration_sentences))
            calibration = torch.utils.data.DataLoader(rows, batch_size=32, collate_fn=self.collator)
        return get_robust_lowrank_model(self._start(setting, seed), config, calibration_data=calibration)

    def build(self, setting: Setting, seed: int) -> Any:
        """A copy of the converted model; a classifier that was not fine-tuned is drawn as the dense model's is."""
        if setting.dense:
            return self._start(setting, seed)
        # Settings that differ only in their training share the conversion.
        same = {"name": "", "unconstrained": False, "warmup": 0.3, "distillation": 0.0, "adversarial": 0.0}
        model = copy.deepcopy(self._converted(replace(setting, **same, trained=True), seed))
        if not setting.fine_tuned:
            model.classifier.load_state_dict(self.dense_model().classifier.state_dict())
        return model

    # ---------------------------------------------------------------------------------------------- trainings

    def train(self, setting: Setting, learning_rate: float, seed: int) -> dict[str, Any]:
        """The row of one training; the model lies in its folder."""
        o = self.options
        learning_rate = learning_rate if setting.trained else 0.0
        facts = {**asdict(setting), "learning_rate": learning_rate, "seed": seed}
        facts["tau"] = str(setting.tau)  # JSON has no infinity

        def make(folder: Path) -> dict[str, Any]:
            model = self.build(setting, seed)
            set_seed(seed)
            steps = o.steps if setting.trained else 1
            result = self._train(model, setting, learning_rate, seed, steps, folder)
            return {"label": setting.name, **facts, **result}

        counts = {name: getattr(o, name) for name in ("steps", "dense_steps", "dense_learning_rate")}
        key = facts | counts | {"calibration_sentences": o.calibration_sentences}
        return self.rows.row(f"{setting.name} lr {learning_rate:g} seed {seed}", key, make)

    def _train(
        self, model: Any, setting: Setting, learning_rate: float, seed: int, steps: int, folder: Path
    ) -> dict[str, Any]:
        trainer = self._trainer(model, setting, learning_rate, seed, steps)
        seconds = trainer.train().metrics["train_runtime"]
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        kappa = condition_numbers(model)
        return {
            "diverged": not all(bool(p.isfinite().all()) for p in model.parameters()),
            "validation_accuracy": trainer.evaluate(self.data["validation"])["eval_accuracy"],
            "condition_numbers": {name: value for name, value in kappa.items() if ".encoder." in name},
            "parameters": sum(p.numel() for p in model.parameters()),
            "training_seconds": round(seconds, 1),
        }

    def _trainer(self, model: Any, setting: Setting, learning_rate: float, seed: int, steps: int) -> Trainer:
        """The Trainer of the library; without factors, or without their step, it trains like transformers' own."""
        adversarial = {"adversarial_attack": "fgsm", "adversarial_epsilon": setting.adversarial}
        adversarial |= {"adversarial_share": 0.5, "adversarial_schedule": "constant"}
        args = CondLRTrainingArguments(
            output_dir=str(Path(tempfile.gettempdir(), "text_study")),
            max_steps=steps,
            learning_rate=learning_rate,
            seed=seed,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=64,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            weight_decay=0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            conditioning_warmup_ratio=setting.warmup if setting.trained else 0.0,
            distillation_weight=setting.distillation,
            **(adversarial if setting.adversarial else {}),
        )
        trainer_class = FactoredTrainer if setting.unconstrained or setting.dense else CondLRTrainer
        trainer = trainer_class(
            model=model,
            args=args,
            train_dataset=self.data["train"],
            data_collator=self.collator,
            processing_class=self.tokenizer,
            teacher=self.dense_model(self.fine_tuned(seed)) if setting.distillation else None,
            compute_metrics=lambda output: {"accuracy": float((np.argmax(output[0], -1) == output[1]).mean())},
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    # --------------------------------------------------------------------------------------- test and attacks

    def test(self, setting: Setting, learning_rate: float, seed: int) -> dict[str, Any]:
        """Accuracy on all test sentences, and under attack on some of them, the same ones for all models."""
        row, o = self.train(setting, learning_rate, seed), self.options

        def clean(model: Any) -> float:
            trainer = self._trainer(model, Setting(dense=True), 0.0, 0, 1)
            return trainer.evaluate(self.data["test"])["eval_accuracy"]

        return attacked(
            Path(row["folder"]),
            setting.name,
            self.attacks(seed),
            o.attacked,
            build=lambda: self.dense_model(row["folder"]).eval(),
            data=lambda: self.raw["test"],
            clean=clean,
            processor=self.tokenizer,
            checks=False,
        )

    def attacks(self, seed: int) -> list[Attack]:
        """The attacks on models of this seed."""
        return ATTACKS + SLOW_ATTACKS if seed == self.first_seed else ATTACKS
