"""Folded models under torchao's quantization: size, latency, accuracy, robustness and κ, before and after.

A fine-tuned text classifier, dense, and the same compressed and folded; each in float32, with int8 weights, with int8
weights and activations (dynamic), and with int4 weights by channel. int4 is stored in bytes on a CPU: torchao packs it
for GPUs only. Accuracy is that of the first `rows` rows; the attack is PGD on embeddings. Activations that are rounded
have no gradient, so the dynamic form cannot be attacked so.

    pip install torchao
    python -m benchmarks.quantization --dense models/sst2 --compressed models/sst2-condlr --data sst2/validation.parquet
"""

from __future__ import annotations

import copy
import io
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.timing import CommonOptions, interleaved, run
from hf_condlr import condition_report, evaluate_robustness, fold_model, is_factored, load_split
from hf_condlr.options import option
from hf_condlr.robustness.attacks import EmbeddingPGD
from hf_condlr.tables import markdown_table

FORMS = ("float32", "int8 weights", "int8 dynamic", "int4 weights")


def settings(form: str) -> Any:
    """What torchao calls the form."""
    from torchao import quantization  # no part of the environment that `make` builds

    by_row = {"weight_dtype": torch.int4, "granularity": quantization.PerAxis(0)}
    makers: dict[str, Callable[[], Any]] = {
        "int8 weights": quantization.Int8WeightOnlyConfig,
        "int8 dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
        "int4 weights": partial(quantization.IntxWeightOnlyConfig, **by_row),
    }
    return makers[form]()


@dataclass
class Options(CommonOptions):
    """What is measured."""

    dense: str = option("", "Folder of the fine-tuned dense classifier.")
    compressed: str = option("", "Folder of the same, compressed.")
    data: str = option("", "Parquet file with texts and labels.")
    rows: int = option(400, "Rows for the accuracy.")
    attacked_rows: int = option(100, "Rows to attack.")
    epsilon: float = option(0.5, "ℓ2 radius of the attack, see docs/robustness.md.")
    steps: int = option(10, "Steps of the attack.")


def quantized(model: Any, form: str) -> Any:
    """A quantized copy: every nn.Linear, so both parts of a folded layer."""
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if form != "float32":
        from torchao.quantization import quantize_

        quantize_(model, settings(form))
    return model


def size(model: Any) -> int:
    """Bytes of the saved weights."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def accuracy(model: Any, batches: list[tuple[Any, torch.Tensor]]) -> float:
    """Share of right predictions."""
    with torch.inference_mode():
        right = [(model(**inputs).logits.argmax(-1) == labels).float() for inputs, labels in batches]
    return torch.cat(right).mean().item()


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """Each model in each form, one more in each result."""
    tokenizer = AutoTokenizer.from_pretrained(options.dense)
    rows = load_split(options.data)
    text = next(name for name, feature in rows.features.items() if getattr(feature, "dtype", "") == "string")
    batches = []
    for first in range(0, options.rows, 32):
        part = rows[first : min(first + 32, options.rows)]
        batches.append((tokenizer(part[text], padding=True, return_tensors="pt"), torch.tensor(part["label"])))
    models = {
        name: AutoModelForSequenceClassification.from_pretrained(getattr(options, name))
        for name in ("dense", "compressed")
    }
    if is_factored(models["compressed"]):
        fold_model(models["compressed"])
    attack = EmbeddingPGD(options.epsilon, steps=options.steps)
    variants = {f"{name}, {form}": quantized(model, form) for name, model in models.items() for form in FORMS}
    one = tokenizer(rows[0][text], return_tensors="pt")
    with torch.inference_mode():
        times = {
            batch: interleaved(
                {key: partial(m, **inputs) for key, m in variants.items()}, options.rounds, torch.device("cpu")
            )
            for batch, inputs in {"1": one, "32": batches[0][0]}.items()
        }
    results: dict[str, Any] = {}
    for key, model in variants.items():
        results[key] = {
            "bytes": size(model),
            "ms": {batch: 1e3 * statistics.median(of[key]) for batch, of in times.items()},
            "accuracy": accuracy(model, batches),
            "robust": None,
            "kappa": None,
        }
        if "dynamic" not in key:
            report = evaluate_robustness(
                model,
                rows.select(range(options.attacked_rows)),
                attack,
                processor=tokenizer,
                checks=False,
                progress=False,
            )
            results[key]["robust"] = report.attacks[0].robust_accuracy
        if key.startswith("compressed"):
            report = condition_report(model)
            results[key]["kappa"] = [report.mean_condition_number, report.max_condition_number]
        yield results


def table(results: dict[str, Any]) -> str:
    """One line for each form."""
    lines = []
    for key, r in results.items():
        kappa = "" if r["kappa"] is None else "{:.2f}, {:.2f}".format(*r["kappa"])
        robust = "no gradient" if r["robust"] is None else f"{r['robust']:.1%}"
        times = [f"{r['ms'][batch]:.1f}" for batch in ("1", "32")]
        lines.append([key, f"{r['bytes'] / 1e6:.1f}", *times, f"{r['accuracy']:.1%}", robust, kappa])
    return markdown_table(
        ["model", "MB", "ms, 1 text", "ms, 32 texts", "accuracy", "under PGD", "κ: mean, largest"], lines
    )


if __name__ == "__main__":
    run(Options, measure, table)
