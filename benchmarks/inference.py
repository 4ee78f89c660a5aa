"""Inference with factored layers: three factors, folded, pivoted, folded and compiled, beside dense.

Per compression ratio and batch size, interleaved in one run, for the linear layers alone (each on random rows of its
own width) and for the whole model:

- `dense`: the model before conversion;
- `three factors`: as it is trained;
- `folded`: `fold_model`, two matrix products a layer;
- `pivoted`: of the same ranks, two smaller products, and outputs in another order;
- `dense, compiled` and `folded, compiled`: the same under `torch.compile`, where a compiler works.

The limit is the ratio of the operations that the linear layers of both take, as `FlopCounterMode` counts them: what a
form can gain in the linear layers if every operation took equally long.

    python -m benchmarks.inference
    python -m benchmarks.inference --model vit-b16 --layers 12 --dtype bfloat16
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from benchmarks.models import CONFIGS, DTYPES, batch_for, build, factor, linear_names, tokens_of
from benchmarks.timing import CommonOptions, interleaved, ratios, run, spread
from hf_condlr import fold_model
from hf_condlr.layers import InferenceForm
from hf_condlr.options import option
from hf_condlr.tables import markdown_table
from studies.record import any_device


@dataclass
class Options(CommonOptions):
    """What is measured."""

    model: str = option("vit-b16", ", ".join(CONFIGS))
    layers: int = option(2, "Blocks of the model; those of ViT-B/16 are 12.")
    compression_ratios: list[float] = option([0.4, 0.6, 0.75], "Share of the linear layers' weights removed.")
    batch_sizes: list[int] = option([1, 64], "Samples in a batch.")
    tokens: int = option(128, "Tokens of a text.")
    dtype: str = option("float32", ", ".join(DTYPES))
    rank_multiple: int = option(1, "Ranks are rounded down to multiples of it.")
    compiled: bool = option(True, "Try torch.compile.")


class LinearLayers(nn.Module):
    """The layers of a model that are factored, or were, without what lies between them."""

    def __init__(self, model: PreTrainedModel, names: list[str]) -> None:
        super().__init__()
        self.layers: Any = nn.ModuleList(model.get_submodule(name) for name in names)

    def forward(self, inputs: dict[int, Tensor]) -> list[Tensor]:  # {n: (B, n)} -> L × (B, m)
        """Each layer on the rows of its width."""
        return [layer(inputs[layer.in_features]) for layer in self.layers]

    def rows(self, count: int, like: Tensor) -> dict[int, Tensor]:  # -> {n: (count, n)}
        """Random inputs."""
        widths = {layer.in_features for layer in self.layers}
        return {n: torch.randn(count, n, dtype=like.dtype, device=like.device) for n in widths}


def why_no_compiler(device: torch.device) -> str | None:
    """The reason, or None where `torch.compile` works."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3, device=device))
    except Exception as error:  # any error of the compiler behind torch
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


class Forms:
    """A model and its factored forms at one compression ratio."""

    def __init__(self, dense: PreTrainedModel, ratio: float, rank_multiple: int, with_compiler: bool) -> None:
        names = linear_names(dense)
        factored = factor(copy.deepcopy(dense), ratio, rank_multiple)
        models: dict[str, Any] = {"dense": dense, "three factors": factored}
        models |= {form: fold_model(copy.deepcopy(factored), form) for form in get_args(InferenceForm)}
        self.linear: dict[str, Any] = {form: LinearLayers(model, names) for form, model in models.items()}
        self.whole: dict[str, Any] = dict(models)
        if with_compiler:
            # With constant shapes: after one batch size torch would otherwise compile for any.
            for form in ("dense", "folded"):
                self.whole[f"{form}, compiled"] = torch.compile(copy.deepcopy(models[form]), dynamic=False)

    def limits(self, inputs: dict[int, Tensor]) -> dict[str, float]:
        """Operations of the dense linear layers over those of each form."""
        counts = {}
        for form in self.linear:
            with FlopCounterMode(display=False) as counter:
                self.linear[form](inputs)
            counts[form] = counter.get_total_flops()
        return {form: counts["dense"] / counts[form.partition(",")[0]] for form in self.whole}


def measure_ratio(
    dense: PreTrainedModel, ratio: float, options: Options, with_compiler: bool, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Seconds of every form, for every batch size: of the linear layers, then of the whole model."""
    forms = Forms(dense, ratio, options.rank_multiple, with_compiler)
    for batch_size in options.batch_sizes:
        batch = batch_for(dense, batch_size, options.tokens, device)
        batch = {key: x.to(dense.dtype) if x.is_floating_point() else x for key, x in batch.items()}
        weight = next(dense.parameters())
        inputs = forms.linear["dense"].rows(batch_size * tokens_of(dense, options.tokens), weight)
        calls: dict[str, dict[str, Callable[[], Any]]] = {
            "linear layers": {form: partial(m, inputs) for form, m in forms.linear.items()},
            "whole model": {form: partial(m, **batch) for form, m in forms.whole.items()},
        }
        for part, of_forms in calls.items():
            times = interleaved(of_forms, options.rounds, device)
            result = {"compression_ratio": ratio, "batch_size": batch_size, "part": part, "seconds": times}
            yield result | {"limits": forms.limits(inputs)}


def measure(options: Options) -> Iterator[dict[str, Any]]:
    """Row after row for every compression ratio; `why_no_compiler` where compiled forms are missing."""
    device = any_device()
    reason = why_no_compiler(device) if options.compiled else "not asked for"
    dense: Any = build(options.model, options.layers).to(device, DTYPES[options.dtype]).eval()
    rows: list[dict[str, Any]] = []
    for ratio in options.compression_ratios:
        torch.compiler.reset()  # each ratio's graphs are its own: torch stops at 8 of one function
        with torch.inference_mode():
            for row in measure_ratio(dense, ratio, options, reason is None, device):
                rows.append(row)
                yield {"rows": rows, "why_no_compiler": reason}


def table(results: dict[str, Any]) -> str:
    """A line for each form that is not dense: its speed-up, and how much of the limit that is."""
    lines = []
    for result in sorted(results["rows"], key=lambda x: (x["part"], x["batch_size"])):
        base = result["seconds"]["dense"]
        for form, times in list(result["seconds"].items())[1:]:
            gains, limit = ratios(base, times), result["limits"][form]
            cells = [result["part"], result["batch_size"], f"{result['compression_ratio']:.0%}", form]
            cells += [f"{1e3 * statistics.median(t):,.1f}" for t in (base, times)]
            lines.append([*cells, spread(gains), f"{limit:.2f}", f"{statistics.median(gains) / limit:.0%}"])
    header = [
        "part",
        "batch",
        "removed",
        "form",
        "dense, ms",
        "ms",
        "speed-up",
        "limit of the linear layers",
        "reached",
    ]
    reason = results["why_no_compiler"]
    return markdown_table(header, lines) + (f"\n\nnot compiled: {reason}" if reason else "")


if __name__ == "__main__":
    run(Options, measure, table)
