"""The manifold step alone: what one step costs beside other ways to take it, on the factor shapes of real models.

Compared, interleaved in one run, per round once each in turn:

- `manifold step`: the two hooks of `attach_manifold_step`, the optimizer's own work (SGD) taken off;
- `projection every k-th`: the same with `projection_interval=k`, per step;
- `loop of QR and SVD`: the same mathematics layer by layer, Householder QR for the bases, an SVD clip for the core;
- `published update`: a transcription of the paper's formulas: dense m×m projector, QR, SVD, layer by layer;
- `stacked SVD polar`: stacked polar retraction by SVD, no conditioning at all;
- `matrix products`: the eleven products of the step and nothing else, the floor.

Beside the time of the first one: the largest number of bytes that it holds at once, in copies of the factors.

    python benchmarks/manifold_step.py --models bert-base-3-layers --rank_ratios 0.2
    python benchmarks/manifold_step.py --models vit-b vit-l llama-1b --rank_ratios 0.25 0.5 --blocks 1
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from record import markdown, write_record
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import HfArgumentParser

from hf_condlr import LowRankLinear, attach_manifold_step
from hf_condlr.linalg import clamp_singular_values, clip_core_by_products

# (m, n) of the linear layers of one block, and the number of blocks
SHAPES = {
    "bert-base-3-layers": ([(768, 768)] * 4 + [(3072, 768), (768, 3072)], 3),
    "bert-base": ([(768, 768)] * 4 + [(3072, 768), (768, 3072)], 12),
    "vit-b": ([(768, 768)] * 4 + [(3072, 768), (768, 3072)], 12),
    "vit-l": ([(1024, 1024)] * 4 + [(4096, 1024), (1024, 4096)], 24),
    "llama-1b": ([(2048, 2048)] * 2 + [(512, 2048)] * 2 + [(8192, 2048)] * 2 + [(2048, 8192)], 16),
}


@dataclass
class Options:
    """What is measured."""

    models: list[str] = field(default_factory=lambda: ["bert-base-3-layers"], metadata={"help": ", ".join(SHAPES)})
    rank_ratios: list[float] = field(default_factory=lambda: [0.2], metadata={"help": "Rank over min(m, n)."})
    blocks: int | None = field(default=None, metadata={"help": "Blocks of a model; all of it if not given."})
    tau: float = field(default=0.1, metadata={"help": "Conditioning tolerance."})
    rounds: int = field(default=7, metadata={"help": "Interleaved repetitions; the median counts."})
    conditioning: bool = field(
        default=False, metadata={"help": "Also the conditioning alone, by eigh and by matrix products."}
    )
    threads: int = field(default=2, metadata={"help": "Threads of torch on a CPU."})
    output: str = field(default="outputs/manifold_step.json", metadata={"help": "Where the numbers go."})


class Case:
    """Layers of a model, their gradients, and every way to take the step. Times are of the step, in seconds."""

    def __init__(self, name: str, rank_ratio: float, options: Options, device: torch.device) -> None:
        block, repeats = SHAPES[name]
        repeats = options.blocks or repeats
        self.device = device
        self.layers = nn.ModuleList(
            LowRankLinear(n, m, max(1, round(rank_ratio * min(m, n))), False, tau=options.tau, device=device)
            for m, n in block * repeats
        )
        self.tau, self.conditioning = options.tau, options.conditioning
        self.lr = 1e-3
        self.optimizer = torch.optim.SGD(self.layers.parameters(), lr=self.lr)
        self.handle = attach_manifold_step(self.optimizer, self.layers, metric_scaling=False)
        for p in self.layers.parameters():
            p.grad = torch.randn_like(p) / p.shape[0] ** 0.5
        self.start = [p.detach().clone() for p in self.layers.parameters()]
        self.gradients = [p.grad.clone() for p in self.layers.parameters()]

    def reset(self) -> None:
        """The same problem for every method and round."""
        for p, value, gradient in zip(self.layers.parameters(), self.start, self.gradients, strict=True):
            p.data.copy_(value)
            p.grad.copy_(gradient)

    def timed(self, step: Callable[[], None]) -> float:
        self.reset()
        _wait(self.device)
        start = time.perf_counter()
        with torch.no_grad():
            step()
        _wait(self.device)
        return time.perf_counter() - start

    def methods(self) -> dict[str, Callable[[], float]]:
        """{name: a call that resets, takes one step and returns its seconds}."""
        alone = {
            "conditioning by eigh": lambda: self.timed(lambda: self.condition(by_products=False)),
            "conditioning by products": lambda: self.timed(lambda: self.condition(by_products=True)),
        }
        return {
            "manifold step": lambda: self.every(1),
            "projection every 4th": lambda: self.every(4),
            "loop of QR and SVD": lambda: self.timed(lambda: self.loop(self.project)),
            "published update": lambda: self.timed(lambda: self.loop(self.project_densely)),
            "stacked SVD polar": lambda: self.timed(self.stacked_svd_polar),
            "matrix products": lambda: self.timed(self.products),
            **(alone if self.conditioning else {}),
        }

    def every(self, interval: int) -> float:
        """One of `interval` steps, the last of which projects; without the optimizer."""
        self.handle.projection_interval, self.handle.step_count = interval, 0
        seconds = self.timed(lambda: self.steps(interval))
        return seconds / interval - self.plain_sgd()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.step()

    def peak_copies(self) -> float:
        """Bytes that a step holds at most, over those of the factors."""
        self.reset()
        with LiveBytes() as live, torch.no_grad():
            self.handle.projection_interval = 1
            self.optimizer.step()
        return live.peak / sum(p.nbytes for p in self.layers.parameters())

    def plain_sgd(self) -> float:
        """The optimizer without the hooks."""
        return self.timed(lambda: torch._foreach_add_(list(self.layers.parameters()), self.gradients, alpha=-self.lr))

    @staticmethod
    def project(U: Tensor, G: Tensor) -> Tensor:
        return G - U @ (U.mT @ G)

    @staticmethod
    def project_densely(U: Tensor, G: Tensor) -> Tensor:
        """(I − UUᵀ)G with the m×m matrix."""
        return (torch.eye(len(U), device=U.device) - U @ U.mT) @ G

    def loop(self, project: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Layer by layer: project, step, project the displacement, QR, SVD clip around the mean."""
        for layer in self.layers:
            for p in (layer.U, layer.V):
                new = p - self.lr * project(p, p.grad)
                Q, R = torch.linalg.qr(p + project(p, new - p))
                p.copy_(Q * R.diagonal().sign())
            P, sigma, Qh = torch.linalg.svd(layer.S - self.lr * layer.S.grad)
            low = 2 * sigma.mean() / (2 + self.tau)
            layer.S.copy_((P * sigma.clamp(low, (1 + self.tau) * low)) @ Qh)

    def stacks(self) -> list[tuple[Tensor, Tensor]]:
        """Bases of equal shape and their gradients, stacked."""
        groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for layer in self.layers:
            for p in (layer.U, layer.V):
                groups.setdefault(tuple(p.shape), []).append(p)
        return [(torch.stack(list(ps)), torch.stack([p.grad for p in ps])) for ps in groups.values()]

    def stacked_svd_polar(self) -> None:
        for U, G in self.stacks():
            P, _, Qh = torch.linalg.svd(U - self.lr * self.project(U, G), full_matrices=False)
            P @ Qh
        torch._foreach_add_([x.S for x in self.layers], [x.S.grad for x in self.layers], alpha=-self.lr)

    def condition(self, by_products: bool) -> None:
        """Cores that a step moved, conditioned in stacks of equal rank."""
        groups: dict[int, list[Tensor]] = {}
        for layer in self.layers:
            groups.setdefault(layer.r, []).append(layer.S)
        for cores in groups.values():
            start = torch.stack(cores)
            S = start - self.lr * torch.stack([p.grad for p in cores if p.grad is not None])
            if by_products:
                bound = torch.full((len(S),), 1 + self.tau, dtype=torch.float64, device=self.device)
                clip_core_by_products(S, bound, "nearest", start)
            else:
                clamp_singular_values(S, self.tau)

    def products(self) -> None:
        """Two projections, a Gram matrix and one product with its inverse factor for U and V; three for S."""
        for U, G in self.stacks():
            for _ in range(2):
                U @ (U.mT @ G)
            U @ (U.mT @ U)
        S = torch.stack([layer.S for layer in self.layers]) if len({x.r for x in self.layers}) == 1 else None
        for X in [S] if S is not None else [layer.S for layer in self.layers]:
            X @ (X @ (X.mT @ X))


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside of it hold at once; what one operation takes within is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(x)._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, Tensor) and _storage(x)._cdata not in given | self.known:
                storage = _storage(x)
                self.known.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def _storage(x: Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(label: str, times: dict[str, list[float]]) -> str:
    """A line for each method: median, least and most, and the median of the ratios to ours, round by round."""
    lines = []
    for method, values in times.items():
        ratios = [value / ours for value, ours in zip(values, times["manifold step"], strict=True)]
        spread = f"{1e3 * min(values):.0f} … {1e3 * max(values):.0f}"
        lines.append([method, f"{1e3 * statistics.median(values):.0f}", spread, f"{statistics.median(ratios):.2f} ×"])
    return markdown([label, "ms (median)", "spread", "against ours"], lines)


def main() -> None:
    """Measure, print a table for each model, write all times."""
    options: Options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]  # type: ignore[arg-type]
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds: dict[str, Any] = {}
    copies: dict[str, float] = {}
    for name, rank_ratio in itertools.product(options.models, options.rank_ratios):
        case = Case(name, rank_ratio, options, device)
        methods = case.methods()
        for call in methods.values():
            call()  # warm
        times: dict[str, list[float]] = {method: [] for method in methods}
        for _ in range(options.rounds):
            for method, call in methods.items():
                times[method].append(call())
        label = f"{name}, rank ratio {rank_ratio:g}"
        seconds[label], copies[label] = times, case.peak_copies()
        sys.stdout.write(table(label, times) + f"\n\nat most {copies[label]:.2f} copies of the factors at once\n\n")
    results = {"seconds": seconds, "copies_of_factors": copies}
    path = write_record(Path(options.output), results, options)
    sys.stdout.write(f"wrote {path}\n")


if __name__ == "__main__":
    main()
