r"""A language model compressed, without a recovery and with one: which start, and what sequential calibration gives.

Plain SVD; FWSVD (Hsu et al. 2022), whose error weighs the inputs of a layer by squared gradients; the inputs' metric
with uniform ranks (SVD-LLM); ranks and start by Fisher, without a bound and with κ ≤ 5; the unbounded ones also with
sequential calibration. Ratios count the form that is served, folded or pivoted. A row is kept when it is finished, and
a second call goes on where the first one ended.

    CONDLR_DATA=path/to/data python -m studies.language --model_path path/to/smollm2-135m
"""

from __future__ import annotations

import copy
import math
import resource
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed

from hf_condlr import (
    Calibration,
    CondLRConfig,
    CondLRTrainer,
    CondLRTrainingArguments,
    condition_report,
    fold_model,
    get_robust_lowrank_model,
)
from hf_condlr.layers import InferenceForm, factored_layers, weight_matrix
from hf_condlr.options import option
from hf_condlr.tables import markdown_table
from studies.language_texts import calibration_blocks, held_out_blocks, written_blocks
from studies.pretrained.fwsvd import input_information, weighted_factors
from studies.record import logger, parse, set_up, write_record
from studies.rows import Rows

FISHER = {"init_weights": "fisher", "rank_allocation": "fisher"}
METHODS: dict[str, dict[str, Any]] = {
    "SVD": {},
    "FWSVD": {},
    "activation-aware": {"init_weights": "activation_aware"},
    "activation-aware, sequential": {"init_weights": "activation_aware", "sequential_calibration": True},
    "Fisher": FISHER,
    "Fisher, sequential": FISHER | {"sequential_calibration": True},
    "Fisher, κ ≤ 5": FISHER | {"tau": 4.0, "conditioned_start": True},
}
PROMPT = "The capital of France is"
RECOVERY_BATCH = 2


@dataclass
class Options:
    """What is compared, on what."""

    model_path: str = field(metadata={"help": "Folder of a causal language model and its tokenizer."})
    output_dir: str = option("runs/language", "Folder for the rows.")
    data_dir: str | None = option(None, "Folder that holds sst2; by default CONDLR_DATA.")
    methods: list[str] = option(list(METHODS), f"Of: {'; '.join(METHODS)}.")
    form: str = option("pivoted", "Form that ratios count, and that is measured.", choices=get_args(InferenceForm))
    ratios: list[float] = option([0.2, 0.4, 0.6], "Shares of the blocks' linear weights that are removed.")
    calibration_blocks: int = option(48, "Blocks of 256 tokens to calibrate on.")
    written_blocks: int = option(0, "Blocks that the dense model writes itself to calibrate on, in addition.")
    held_out_blocks: int = option(8, "Blocks of 256 tokens of each kind of text to measure on.")
    batch_size: int = option(4, "Blocks that run at a time to measure perplexity; calibration takes one at a time.")
    recovery_steps: int = option(0, "Steps of distillation from the dense model, on texts of the calibration's kinds.")
    learning_rate: float = option(1e-4, "Learning rate of the recovery.")
    bfloat16: bool = option(False, "Run over the calibration data in bfloat16; perplexities are measured in float32.")
    threads: int | None = option(None, "Threads of torch; by default its own choice.")


class Study:
    """The dense model, its texts, and what was measured of it once for all rows."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.tokenizer = AutoTokenizer.from_pretrained(options.model_path)
        self.model = AutoModelForCausalLM.from_pretrained(options.model_path, dtype=torch.float32).eval()
        self.held_out = held_out_blocks(self.tokenizer, options.held_out_blocks, options.data_dir)
        self._information: dict[str, Tensor] = {}  # for FWSVD; its seconds count in the first row that needs it

    @cached_property
    def data(self) -> list[dict[str, Tensor]]:
        """A block in each batch: what a backward pass keeps of a batch is the peak of memory."""
        options = self.options
        blocks = calibration_blocks(self.tokenizer, options.calibration_blocks, options.data_dir)
        if options.written_blocks:
            blocks = torch.cat([blocks, written_blocks(self.model, self.tokenizer, options.written_blocks)])
        return [{"input_ids": ids} for ids in blocks.split(1)]

    @cached_property
    def calibration(self) -> Calibration:
        """What all rows share, measured when the first one needs it."""
        return Calibration(self.data, autocast=torch.bfloat16 if self.options.bfloat16 else None)

    def dense(self, folder: Path) -> dict[str, Any]:
        """The row of the dense model."""
        return self._measured(self.model) | {"seconds": 0.0, "kappa": None}

    def compressed(self, method: str, ratio: float, folder: Path) -> dict[str, Any]:
        """The row of a method at a ratio."""
        config = CondLRConfig(
            **{"compression_ratio": ratio, "compression_form": self.options.form, "tau": "inf"} | METHODS[method]
        )
        model, start = copy.deepcopy(self.model), time.process_time()
        data = self.calibration if config.needs_calibration_data else None
        get_robust_lowrank_model(model, config, calibration_data=data)
        if method == "FWSVD":
            layers = factored_layers(model)
            if missing := [name for name in layers if name not in self._information]:
                labelled = (batch | {"labels": batch["input_ids"]} for batch in self.data)
                self._information |= input_information(self.model, missing, labelled)
            for name, layer in layers.items():
                W = weight_matrix(self.model.get_submodule(name))
                with torch.no_grad():
                    layer.set_factors(*weighted_factors(W, self._information[name], layer.r))
        if self.options.recovery_steps:
            self.recover(model, folder)
        seconds = time.process_time() - start
        kappa = max(layer.condition_number for layer in condition_report(model).layers)
        fold_model(model, self.options.form)
        return {"seconds": seconds, "kappa": kappa if math.isfinite(kappa) else None} | self._measured(model)

    def recover(self, model: Any, folder: Path) -> None:
        """Distil the dense model into a compressed one, in place, by the schedule of `compress`."""
        set_seed(0)
        steps, tokenizer, data_dir = self.options.recovery_steps, self.tokenizer, self.options.data_dir
        texts = calibration_blocks(tokenizer, 3 * math.ceil(steps * RECOVERY_BATCH / 3), data_dir)
        args = CondLRTrainingArguments(
            output_dir=str(folder / "recovery"),
            max_steps=steps,
            learning_rate=self.options.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            per_device_train_batch_size=RECOVERY_BATCH,
            conditioning_warmup_ratio=0.0,
            distillation_weight=0.9,
            save_strategy="no",
            logging_steps=10,
            report_to=[],
            disable_tqdm=True,
            use_cpu=self.model.device.type == "cpu",
        )
        samples: Any = [{"input_ids": ids, "labels": ids} for ids in texts]
        trainer = CondLRTrainer(model=model, args=args, train_dataset=samples, teacher=self.model)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        model.eval()

    @torch.no_grad()
    def _measured(self, model: Any) -> dict[str, Any]:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        perplexity = {kind: self._perplexity(model, blocks) for kind, blocks in self.held_out.items()}
        perplexity["mean"] = math.prod(perplexity.values()) ** (1 / len(perplexity))
        prompt = self.tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
        written = model.generate(**prompt, max_new_tokens=24, do_sample=False)
        return {"perplexity": perplexity, "peak_gib": peak, "sample": self.tokenizer.decode(written[0])}

    def _perplexity(self, model: Any, blocks: Tensor) -> float:
        batches = blocks.split(self.options.batch_size)
        losses = [model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in batches]
        return math.exp(sum(losses) / len(blocks))


def table(rows: list[dict[str, Any]]) -> str:
    """A line a row; perplexities of each kind of text."""
    kinds = list(rows[0]["perplexity"])
    dense = rows[0]["perplexity"]["mean"]
    lines = []
    for row in rows:
        found = row["perplexity"]
        kappa = "" if row["kappa"] is None else f"{row['kappa']:.3g}"
        values = [f"{found[kind]:.4g}" for kind in kinds]
        lines.append([row["label"], *values, f"{found['mean'] / dense:.2f}", kappa, f"{row['seconds']:.0f}"])
    return markdown_table(["", *kinds, "of dense", "largest κ", "core seconds"], lines, align="l")


def main() -> None:
    """Make what is missing; print the table and the samples; write the record."""
    (options,) = parse(Options)
    set_up(options.threads)
    study, root = Study(options), Rows(Path(options.output_dir))
    shared = {k: v for k, v in asdict(options).items() if k in ("model_path", "calibration_blocks", "held_out_blocks")}
    rows = [root.row("dense", shared, study.dense) | {"label": "dense"}]
    for ratio in options.ratios:
        for method in options.methods:
            key = shared | {"method": method, "ratio": ratio, "config": METHODS[method]}
            key |= {"form": options.form} if options.form != "folded" else {}  # rows of before had no other
            key |= {"bfloat16": True} if options.bfloat16 and METHODS[method] else {}
            key |= {"written_blocks": options.written_blocks} if options.written_blocks else {}
            key |= {k: getattr(options, k) for k in ("recovery_steps", "learning_rate") if options.recovery_steps}
            label = f"{100 * ratio:.0f} % removed, {method}"
            rows.append(root.row(label, key, partial(study.compressed, method, ratio)) | {"label": label})
            logger.info("%s: perplexity %.4g", label, rows[-1]["perplexity"]["mean"])
    print(table(rows))
    print("\n".join(f"- {row['label']}: {row['sample']!r}" for row in rows))
    print("\nwrote", write_record(Path(options.output_dir) / "results.json", {"rows": rows}, options))


if __name__ == "__main__":
    main()
