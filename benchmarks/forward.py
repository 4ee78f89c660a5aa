"""A factored linear layer: what the order of the products x V Sᵀ Uᵀ costs in time and in saved activations.

Compared, interleaved in one run, forward with backward, and forward alone:

- `layer`: `LowRankLinear`, which chooses by the number of rows;
- `three products`: ((x V) Sᵀ) Uᵀ;
- `folded`: S joined with the basis of the smaller side first, (x V)(U S)ᵀ or (x (V Sᵀ)) Uᵀ;
- `dense`: x Wᵀ.

Saved bytes are those of what autograd keeps between forward and backward, beside x and the parameters.

    python -m benchmarks.forward --rows 64 512 4096 --rounds 5
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import CommonOptions, any_device, interleaved, ratios, run
from hf_condlr import LowRankLinear
from hf_condlr.tables import markdown_table
from studies.record import option

# (m, n): attention and the two layers of the MLP, of ViT-B and BERT-base
SHAPES = {"768x768": (768, 768), "3072x768": (3072, 768), "768x3072": (768, 3072)}


@dataclass
class Options(CommonOptions):
    """What is measured."""

    shapes: list[str] = option(list(SHAPES), "out x in: " + ", ".join(SHAPES))
    rank_ratios: list[float] = option([0.25, 0.5], "r / min(m, n).")
    rows: list[int] = option([64, 512, 4096], "Tokens in the batch, B.")


def three_products(layer: LowRankLinear, x: Tensor) -> Tensor:
    """((x V) Sᵀ) Uᵀ."""
    return F.linear(F.linear(F.linear(x, layer.V.mT), layer.S), layer.U, layer.bias)


def folded(layer: LowRankLinear, x: Tensor) -> Tensor:
    """(x V)(U S)ᵀ or (x (V Sᵀ)) Uᵀ."""
    if layer.out_features <= layer.in_features:
        return F.linear(F.linear(x, layer.V.mT), layer.U @ layer.S, layer.bias)
    return F.linear(F.linear(x, (layer.V @ layer.S.mT.contiguous()).mT), layer.U, layer.bias)


def saved_bytes(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Storages that autograd keeps, each once."""
    known = {t.untyped_storage().data_ptr() for t in (x, *module.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call(x)
    del result  # not before: what it holds keeps addresses from being used twice
    return sum(kept.values())


def measure_layer(name: str, ratio: float, rows: int, rounds: int) -> dict[str, Any]:
    """Seconds of every method and round, and the saved bytes."""
    (m, n), device = SHAPES[name], any_device()
    layer = LowRankLinear(n, m, round(ratio * min(m, n)), device=device)
    dense = nn.Linear(n, m, device=device)
    x = torch.randn(rows, n, device=device, requires_grad=True)
    gradient = torch.randn(rows, m, device=device)
    calls: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
        "layer": (layer, layer),
        "three products": (layer, lambda x: three_products(layer, x)),
        "folded": (layer, lambda x: folded(layer, x)),
        "dense": (dense, dense),
    }
    training = {name: lambda call=call: call(x).backward(gradient) for name, (_, call) in calls.items()}
    inference = {name: torch.no_grad()(lambda call=call: call(x)) for name, (_, call) in calls.items()}
    return {
        "shape": name,
        "r": layer.r,
        "rows": rows,
        "seconds": {
            "training": interleaved(training, rounds, device),
            "inference": interleaved(inference, rounds, device),
        },
        "saved_bytes": {name: saved_bytes(module, call, x) for name, (module, call) in calls.items()},
    }


def measure(options: Options) -> list[dict[str, Any]]:
    """Every shape, rank and number of rows."""
    cases = itertools.product(options.shapes, options.rank_ratios, options.rows)
    return [measure_layer(*case, options.rounds) for case in cases]


def table(results: list[dict[str, Any]]) -> str:
    """Median of the ratios, round by round."""
    methods, lines = ["layer", "folded", "dense"], []
    for result in results:
        cells = [
            f"{statistics.median(ratios(times[method], times['three products'])):.2f}"
            for times in result["seconds"].values()
            for method in methods
        ]
        saved = result["saved_bytes"]["layer"] / result["saved_bytes"]["three products"]
        lines.append([result["shape"], result["r"], f"{result['rows']:,}", *cells, f"{saved:.2f}"])
    header = ["W", "r", "B", *(f"{m}, {mode}" for mode in ("training", "inference") for m in methods), "saved, layer"]
    return f"Against the three products\n\n{markdown_table(header, lines)}"


if __name__ == "__main__":
    run(Options, measure, table)
