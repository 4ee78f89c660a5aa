"""A factored linear layer: what the order of the products x V Sᵀ Uᵀ costs in time and in saved activations.

Compared, interleaved in one run, forward with backward, and forward alone:

- `layer`: `LowRankLinear`, which chooses by the number of rows;
- `three products`: ((x V) Sᵀ) Uᵀ;
- `folded`: S joined with the basis of the smaller side first, (x V)(U S)ᵀ or (x (V Sᵀ)) Uᵀ;
- `dense`: x Wᵀ.

Saved bytes are those of what autograd keeps between forward and backward, beside x and the parameters.

    python benchmarks/forward.py --rows 64 512 4096 --rounds 5
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import markdown, write_record
from torch import Tensor, nn
from transformers import HfArgumentParser

from hf_condlr import LowRankLinear

# (m, n): attention and the two layers of the MLP, of ViT-B and BERT-base
SHAPES = {"768x768": (768, 768), "3072x768": (3072, 768), "768x3072": (768, 3072)}


@dataclass
class Options:
    """What is measured."""

    shapes: list[str] = field(default_factory=lambda: list(SHAPES), metadata={"help": "out x in: " + ", ".join(SHAPES)})
    rank_ratios: list[float] = field(default_factory=lambda: [0.25, 0.5], metadata={"help": "r / min(m, n)."})
    rows: list[int] = field(default_factory=lambda: [64, 512, 4096], metadata={"help": "Tokens in the batch, B."})
    rounds: int = field(default=5, metadata={"help": "Interleaved repetitions; the median of the ratios counts."})
    threads: int = field(default=1, metadata={"help": "Threads of torch on a CPU."})
    output: str = field(default="outputs/forward.json", metadata={"help": "Where the numbers go."})


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


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(shape: tuple[int, int], ratio: float, rows: int, options: Options, device: torch.device) -> dict[str, Any]:
    """Seconds of every method and round, and the saved bytes."""
    m, n = shape
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
    times: dict[str, dict[str, list[float]]] = {name: {"training": [], "inference": []} for name in calls}
    for turn in range(options.rounds + 1):
        for name, (_, call) in calls.items():
            training = seconds(lambda call=call: call(x).backward(gradient), device)  # type: ignore[misc]
            with torch.no_grad():
                inference = seconds(lambda call=call: call(x), device)  # type: ignore[misc]
            if turn:  # the first one warms up
                times[name]["training"].append(training)
                times[name]["inference"].append(inference)
    saved = {name: saved_bytes(module, call, x) for name, (module, call) in calls.items()}
    return {"r": layer.r, "rows": rows, "seconds": times, "saved_bytes": saved}


def main() -> None:
    """Measure, print a table, write all times."""
    options: Options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]  # type: ignore[arg-type]
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results, lines = [], []
    for name in options.shapes:
        for ratio in options.rank_ratios:
            for rows in options.rows:
                result = {"shape": name, **measure(SHAPES[name], ratio, rows, options, device)}
                results.append(result)
                lines.append([name, str(result["r"]), f"{rows:,}", *_ratios(result)])
    methods = ["layer", "folded", "dense"]
    header = ["W", "r", "B", *(f"{m}, {mode}" for mode in ("training", "inference") for m in methods), "saved, layer"]
    sys.stdout.write(f"Against the three products\n\n{markdown(header, lines)}\n\n")
    path = write_record(Path(options.output), {"results": results}, options)
    sys.stdout.write(f"wrote {path}\n")


def _ratios(result: dict[str, Any]) -> list[str]:
    cells = []
    for mode in ("training", "inference"):
        base = result["seconds"]["three products"][mode]
        for name in ("layer", "folded", "dense"):
            pairs = zip(result["seconds"][name][mode], base, strict=True)
            cells.append(f"{statistics.median(a / b for a, b in pairs):.2f}")
    return [*cells, f"{result['saved_bytes']['layer'] / result['saved_bytes']['three products']:.2f}"]


if __name__ == "__main__":
    main()
