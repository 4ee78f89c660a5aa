"""The manifold step alone: what one step costs beside other ways to take it, on the factor shapes of real models.

Compared, interleaved in one run, per round once each in turn:

- `manifold step`: the two hooks of `attach_manifold_step`, the optimizer's own work (SGD) taken off; cores start with
  κ = 1 and stay inside their bound;
- `every core at its bound`: the same, where each step pushes some singular values of every core over the bound;
- `projection every 4th`: the same with `projection_interval=4`, per step;
- `loop of QR and SVD`: the same mathematics layer by layer, Householder QR for the bases, an SVD clip for the core;
- `published update`: a transcription of the paper's formulas: dense m×m projector, QR, SVD, layer by layer;
- `stacked SVD polar`: stacked polar retraction by SVD, no conditioning at all;
- `matrix products`: the eleven products of the step and nothing else, the floor.

Besides, the largest number of bytes that the first one holds at once, in copies of the factors.

    python -m benchmarks.manifold_step --models bert-base-3-layers --rank_ratios 0.2
    python -m benchmarks.manifold_step --models vit-b vit-l llama-1b --rank_ratios 0.25 0.5 --blocks 1
"""

from __future__ import annotations

import itertools
import statistics
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.timing import CommonOptions, in_turn, ratios, run, seconds
from hf_condlr import LowRankLinear, attach_manifold_step
from hf_condlr.config import option
from hf_condlr.linalg import clamp_singular_values, clip_core_by_products, project_horizontal
from hf_condlr.tables import markdown_table
from studies.record import any_device

# (m, n) of the linear layers of one block, and the number of blocks
SHAPES = {
    "bert-base-3-layers": ([(768, 768)] * 4 + [(3072, 768), (768, 3072)], 3),
    "bert-base": ([(768, 768)] * 4 + [(3072, 768), (768, 3072)], 12),
    "vit-b": ([(768, 768)] * 4 + [(3072, 768), (768, 3072)], 12),
    "vit-l": ([(1024, 1024)] * 4 + [(4096, 1024), (1024, 4096)], 24),
    "llama-1b": ([(2048, 2048)] * 2 + [(512, 2048)] * 2 + [(8192, 2048)] * 2 + [(2048, 8192)], 16),
}
LEARNING_RATE = 1e-3


@dataclass
class Options(CommonOptions):
    """What is measured."""

    models: list[str] = option(["bert-base-3-layers"], ", ".join(SHAPES))
    rank_ratios: list[float] = option([0.2], "Rank over min(m, n).")
    blocks: int | None = option(None, "Blocks of a model; all of it if not given.")
    tau: float = option(0.1, "Conditioning tolerance.")
    rounds: int = option(7, "Interleaved repetitions; medians are printed.")
    conditioning: bool = option(False, "Also the conditioning alone, by eigh and by matrix products.")
    threads: int = option(2, "Threads of torch on a CPU.")


def shapes_of(name: str, rank_ratio: float, blocks: int | None) -> list[tuple[int, int, int]]:
    """(m, n, r) of every linear layer in `blocks` blocks of a model, or in all of it."""
    block, repeats = SHAPES[name]
    return [(m, n, max(1, round(rank_ratio * min(m, n)))) for m, n in block * (blocks or repeats)]


class Case:
    """Layers of the given shapes, their gradients, and every way to take the step, with its time in seconds."""

    def __init__(self, shapes: list[tuple[int, int, int]], tau: float, device: torch.device) -> None:
        self.layers = nn.ModuleList(LowRankLinear(n, m, r, False, tau=tau, device=device) for m, n, r in shapes)
        self.tau, self.device = tau, device
        self.factors = list(self.layers.parameters())
        self.optimizer = torch.optim.SGD(self.factors, lr=LEARNING_RATE)
        self.handle = attach_manifold_step(self.optimizer, self.layers, metric_scaling=False)
        self.start = [p.detach().clone() for p in self.factors]
        at_bound = [clamp_singular_values(torch.randn_like(layer.S), tau) for layer in self.layers]
        self.at_bound = {id(layer.S): S for layer, S in zip(self.layers, at_bound, strict=True)}
        self.gradients = [torch.randn_like(p) / p.shape[0] ** 0.5 for p in self.start]

    def reset(self) -> None:
        """The same problem for every method and round."""
        for p, value in zip(self.factors, self.start, strict=True):
            p.data.copy_(value)
        self.renew_gradients()

    def renew_gradients(self) -> None:
        """As backward leaves them."""
        for p, gradient in zip(self.factors, self.gradients, strict=True):
            p.grad = gradient.clone()

    def settled(self, interval: int, at_bound: bool = False) -> None:
        """A step from the start, after which the handle no longer sees that other code wrote the factors."""
        self.reset()
        for p in self.factors:
            if at_bound and id(p) in self.at_bound:
                p.data.copy_(self.at_bound[id(p)])
        self.handle.projection_interval, self.handle.step_count = 1, 0
        self.optimizer.step()
        self.handle.projection_interval, self.handle.step_count = interval, 0
        self.renew_gradients()

    def timed(self, step: Callable[[], None]) -> float:
        """Seconds of a step from the start."""
        self.reset()
        with torch.no_grad():
            return seconds(step, self.device)

    def methods(self, conditioning: bool) -> dict[str, Callable[[], float]]:
        """{name: a call that takes one step from the start and returns its seconds}."""
        alone = {
            "conditioning by eigh": lambda: self.timed(lambda: self.condition(by_products=False)),
            "conditioning by products": lambda: self.timed(lambda: self.condition(by_products=True)),
        }
        return {
            "manifold step": lambda: self.every(1),
            "every core at its bound": lambda: self.every(1, at_bound=True),
            "projection every 4th": lambda: self.every(4),
            "loop of QR and SVD": lambda: self.timed(lambda: self.loop(project_horizontal)),
            "published update": lambda: self.timed(lambda: self.loop(project_densely)),
            "stacked SVD polar": lambda: self.timed(self.stacked_svd_polar),
            "matrix products": lambda: self.timed(self.products),
            **(alone if conditioning else {}),
        }

    def every(self, interval: int, at_bound: bool = False) -> float:
        """One of `interval` steps, the last of which projects; without the optimizer."""
        self.settled(interval, at_bound)
        elapsed = seconds(lambda: [self.optimizer.step() for _ in range(interval)], self.device)
        plain = self.timed(lambda: torch._foreach_add_(self.factors, self.gradients, alpha=-LEARNING_RATE))
        return elapsed / interval - plain

    def peak_copies(self) -> float:
        """Bytes that a step holds at most, over those of the factors."""
        self.settled(1)
        with LiveBytes() as live, torch.no_grad():
            self.optimizer.step()
        return live.peak / sum(p.nbytes for p in self.factors)

    def loop(self, project: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Layer by layer: project, step, project the displacement, QR, SVD clip around the mean."""
        for layer in self.layers:
            for p in (layer.U, layer.V):
                new = p - LEARNING_RATE * project(p, p.grad)
                Q, R = torch.linalg.qr(p + project(p, new - p))
                p.copy_(Q * R.diagonal().sign())
            P, sigma, Qh = torch.linalg.svd(layer.S - LEARNING_RATE * layer.S.grad)
            low = 2 * sigma.mean() / (2 + self.tau)
            layer.S.copy_((P * sigma.clamp(low, (1 + self.tau) * low)) @ Qh)

    def stacks(self, kinds: str) -> list[tuple[Tensor, Tensor]]:
        """Factors of equal shape and their gradients, stacked."""
        groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for layer in self.layers:
            for kind in kinds:
                p = getattr(layer, kind)
                groups.setdefault(tuple(p.shape), []).append(p)
        return [(torch.stack(list(ps)), torch.stack([p.grad for p in ps])) for ps in groups.values()]

    def stacked_svd_polar(self) -> None:
        """The retraction of the bases, and SGD for the cores."""
        for U, G in self.stacks("UV"):
            P, _, Qh = torch.linalg.svd(U - LEARNING_RATE * project_horizontal(U, G), full_matrices=False)
            P @ Qh
        torch._foreach_add_([x.S for x in self.layers], [x.S.grad for x in self.layers], alpha=-LEARNING_RATE)

    def condition(self, by_products: bool) -> None:
        """Cores that a step moved, conditioned in stacks of equal rank."""
        for start, G in self.stacks("S"):
            S = start - LEARNING_RATE * G
            if by_products:
                bound = torch.full((len(S),), 1 + self.tau, dtype=torch.float64, device=self.device)
                clip_core_by_products(S, bound, "nearest", start)
            else:
                clamp_singular_values(S, self.tau)

    def products(self) -> None:
        """Two projections, a Gram matrix and one product with its inverse factor for U and V; three for S."""
        for U, G in self.stacks("UV"):
            for _ in range(2):
                U @ (U.mT @ G)
            U @ (U.mT @ U)
        for S, _ in self.stacks("S"):
            S @ (S @ (S.mT @ S))


def project_densely(U: Tensor, G: Tensor) -> Tensor:
    """(I − UUᵀ)G with the m×m matrix."""
    return (torch.eye(len(U), device=U.device) - U @ U.mT) @ G


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside of it hold at once; what one operation takes within is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given | self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


def measure(options: Options) -> dict[str, dict[str, Any]]:
    """Seconds of every method and round, and the copies, for each model."""
    results = {}
    for name, rank_ratio in itertools.product(options.models, options.rank_ratios):
        case = Case(shapes_of(name, rank_ratio, options.blocks), options.tau, any_device())
        times = in_turn(case.methods(options.conditioning), options.rounds)
        results[f"{name}, rank ratio {rank_ratio:g}"] = {"seconds": times, "copies_of_factors": case.peak_copies()}
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each method: median, least and most, and the median of the ratios to ours, round by round."""
    parts = []
    for label, result in results.items():
        lines = []
        for method, values in result["seconds"].items():
            against = statistics.median(ratios(values, result["seconds"]["manifold step"]))
            least_and_most = f"{1e3 * min(values):.0f} … {1e3 * max(values):.0f}"
            lines.append([method, f"{1e3 * statistics.median(values):.0f}", least_and_most, f"{against:.2f} ×"])
        parts.append(markdown_table([label, "ms (median)", "spread", "against ours"], lines))
        parts.append(f"at most {result['copies_of_factors']:.2f} copies of the factors at once")
    return "\n\n".join(parts)


if __name__ == "__main__":
    run(Options, measure, table)
