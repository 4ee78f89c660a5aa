"""The manifold step alone: what one step costs beside other ways to take it, on the factor shapes of real models.

Compared, interleaved in one run, per round once each in turn:

- `manifold step`: the two hooks of `attach_manifold_step`, the optimizer's own work (SGD) taken off;
- `projection every 4th`: the same with `projection_interval=4`, per step;
- `loop of QR and SVD`: the same mathematics layer by layer, Householder QR for the bases, an SVD clip for the core;
- `published update`: a transcription of the paper's formulas: dense m×m projector, QR, SVD, layer by layer;
- `stacked SVD polar`: stacked polar retraction by SVD, no conditioning at all;
- `matrix products`: the eleven products of the step and nothing else, the floor;
- on a GPU `manifold step, TF32` and `matrix products, TF32`: what products of 10 bits would gain. The library never
  computes so; how far the constraint is missed then is recorded.

The manifold step goes on from where its last step left the factors, since values that other code wrote would be brought
back to the constraint first; the others start each time from the same values, on copies.

Besides, the largest number of bytes that the first one holds at once, in copies of the factors.

    python -m benchmarks.manifold_step --models bert-base-3-layers --rank_ratios 0.2
    python -m benchmarks.manifold_step --models vit-b vit-l llama-1b --rank_ratios 0.25 0.5 --blocks 1
    python -m benchmarks.manifold_step --models vit-b vit-l llama-1b --compression_ratio 0.6 --longest 1
"""

from __future__ import annotations

import copy
import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.models import worst_errors
from benchmarks.timing import CommonOptions, in_turn, run, seconds
from hf_condlr import LowRankLinear, attach_manifold_step
from hf_condlr.conversion.rank_budget import allocate_uniform
from hf_condlr.linalg import clamp_singular_values, clip_core_by_products, precision, project_horizontal
from hf_condlr.options import option
from hf_condlr.tables import markdown_table
from studies.record import any_device

# (m, n) of the linear layers of one block, and the number of blocks
SHAPES = {
    "bert-base-3-layers": ([(768, 768)] * 4 + [(3072, 768), (768, 3072)], 3),
    "bert-base": ([(768, 768)] * 4 + [(3072, 768), (768, 3072)], 12),
    "vit-b": ([(768, 768)] * 4 + [(3072, 768), (768, 3072)], 12),
    "vit-l": ([(1024, 1024)] * 4 + [(4096, 1024), (1024, 4096)], 24),
    "tiny": ([(16, 16), (24, 16)], 1),  # to see whether a script runs
    "llama-1b": ([(2048, 2048)] * 2 + [(512, 2048)] * 2 + [(8192, 2048)] * 2 + [(2048, 8192)], 16),
}
LEARNING_RATE = 1e-3
STEP, STEP_TF32 = "manifold step", "manifold step, TF32"
KINDS = {
    "step": (STEP, "projection every 4th", STEP_TF32),
    "loop": ("loop of QR and SVD",),
    "published": ("published update",),
    "polar": ("stacked SVD polar",),
    "products": ("matrix products", "matrix products, TF32"),
}
Shape = tuple[int, int, int]  # m, n, r


@dataclass
class Options(CommonOptions):
    """What is measured."""

    models: list[str] = option(["bert-base-3-layers"], ", ".join(SHAPES))
    rank_ratios: list[float] = option([0.2], "Rank over min(m, n).")
    compression_ratio: float | None = option(None, "In place of rank_ratios: share of the weights removed.")
    blocks: int | None = option(None, "Blocks of a model; all of it if not given.")
    tau: float = option(0.1, "Conditioning tolerance.")
    rounds: int = option(7, "Interleaved repetitions; medians are printed.")
    methods: list[str] = option(list(KINDS), "Which comparisons: " + ", ".join(KINDS))
    conditioning: bool = option(False, "Also the conditioning alone, by eigh and by matrix products.")
    longest: float | None = option(None, "Calls that took more seconds when they warmed up are not repeated.")
    threads: int = option(2, "Threads of torch on a CPU.")


def shapes_of(name: str, rank_ratio: float, blocks: int | None = None) -> list[Shape]:
    """(m, n, r) of every linear layer in `blocks` blocks of a model, or in all of it."""
    block, repeats = SHAPES[name]
    return [(m, n, max(1, round(rank_ratio * min(m, n)))) for m, n in block * (blocks or repeats)]


def rank_ratio_at(name: str, compression_ratio: float) -> float:
    """The rank ratio, uniform over the layers, at which that share of the linear layers' weights is removed."""
    layers = {str(i): shape for i, shape in enumerate(SHAPES[name][0])}
    ranks = allocate_uniform(layers, compression_ratio)
    return min((ranks[i] or min(layers[i])) / min(layers[i]) for i in layers)


@contextmanager
def in_tf32() -> Iterator[None]:
    """Products of float32 matrices on tensor cores, of 10 bits, in the step as well, which forbids it."""
    matmul: Any = torch.backends.cuda.matmul
    matmul.fp32_precision = "tf32"
    try:
        with mock.patch.object(precision, "_settings", list):
            yield
    finally:
        matmul.fp32_precision = "none"  # follows the wider settings again


class Case:
    """Layers of the given shapes, their gradients, and every way to take the step, with its time in seconds."""

    def __init__(self, shapes: list[Shape], tau: float, device: torch.device) -> None:
        self.layers = nn.ModuleList(LowRankLinear(n, m, r, False, tau=tau, device=device) for m, n, r in shapes)
        self.tau, self.device = tau, device
        self.factors = list(self.layers.parameters())
        self.optimizer = torch.optim.SGD(self.factors, lr=LEARNING_RATE)
        self.handle = attach_manifold_step(self.optimizer, self.layers, metric_scaling=False)
        self.start = [p.detach().clone() for p in self.factors]
        self.gradients = [torch.randn_like(p) / p.shape[0] ** 0.5 for p in self.start]
        self.copies: Any = copy.deepcopy(self.layers)

    def give_gradients(self) -> None:
        """The same for every step: the last one projected those that it got."""
        for p, gradient in zip(self.factors, self.gradients, strict=True):
            p.grad = gradient.clone()

    def reset(self) -> None:
        """The same problem on the copies for every method and round."""
        for p, value, gradient in zip(self.copies.parameters(), self.start, self.gradients, strict=True):
            p.data.copy_(value)
            p.grad = gradient.clone()

    def timed(self, step: Callable[[], None]) -> float:
        """Seconds of a step of the copies from the start."""
        self.reset()
        with torch.no_grad():
            return seconds(step, self.device)

    def methods(self, kinds: Sequence[str], conditioning: bool = False) -> dict[str, Callable[[], float]]:
        """{name: a call that takes one step and returns its seconds}, of some of `KINDS`."""
        alone = {
            "conditioning by eigh": lambda: self.timed(lambda: self.condition(by_products=False)),
            "conditioning by products": lambda: self.timed(lambda: self.condition(by_products=True)),
        }
        tf32 = {
            STEP_TF32: lambda: within(in_tf32, lambda: self.every(1)),
            "matrix products, TF32": lambda: within(in_tf32, lambda: self.timed(self.products)),
        }
        every_kind = {
            STEP: lambda: self.every(1),
            "projection every 4th": lambda: self.every(4),
            "loop of QR and SVD": lambda: self.timed(lambda: self.loop(project_horizontal)),
            "published update": lambda: self.timed(lambda: self.loop(project_densely)),
            "stacked SVD polar": lambda: self.timed(self.stacked_svd_polar),
            "matrix products": lambda: self.timed(self.products),
            **(tf32 if self.device.type == "cuda" else {}),
        }
        wanted = {name for kind in kinds for name in KINDS[kind]}
        return {name: x for name, x in every_kind.items() if name in wanted} | (alone if conditioning else {})

    def every(self, interval: int) -> float:
        """One of `interval` steps, the last of which projects; without the optimizer."""
        self.handle.projection_interval, self.handle.step_count = interval, 0
        self.give_gradients()
        elapsed = seconds(lambda: [self.optimizer.step() for _ in range(interval)] and None, self.device)
        copies = list(self.copies.parameters())
        plain = self.timed(lambda: torch._foreach_add_(copies, self.gradients, alpha=-LEARNING_RATE))
        return elapsed / interval - plain

    def peak_copies(self) -> float:
        """Bytes that a step holds at most, over those of the factors."""
        self.every(1)
        self.give_gradients()
        with LiveBytes() as live:
            self.optimizer.step()
        return live.peak / sum(p.nbytes for p in self.factors)

    def errors(self) -> dict[str, dict[str, float]]:
        """What the constraint misses after a step, in float64: ‖UᵀU − I‖_F/√r, and κ(S) over its bound."""
        found = {}
        for name, call in self.methods(["step"]).items():
            if name in (STEP, STEP_TF32):
                call()
                layers: Any = dict(enumerate(self.layers))
                found[name] = dict(zip(("orthonormality", "kappa_over_bound"), worst_errors(layers), strict=True))
        return found

    def loop(self, project: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Layer by layer: project, step, project the displacement, QR, SVD clip around the mean."""
        for layer in self.copies:
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
        for layer in self.copies:
            for kind in kinds:
                p = getattr(layer, kind)
                groups.setdefault(tuple(p.shape), []).append(p)
        return [(torch.stack(list(ps)), torch.stack([p.grad for p in ps])) for ps in groups.values()]

    def stacked_svd_polar(self) -> None:
        """The retraction of the bases, and SGD for the cores."""
        for U, G in self.stacks("UV"):
            P, _, Qh = torch.linalg.svd(U - LEARNING_RATE * project_horizontal(U, G), full_matrices=False)
            P @ Qh
        torch._foreach_add_([x.S for x in self.copies], [x.S.grad for x in self.copies], alpha=-LEARNING_RATE)

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


def within(context: Callable[[], Any], call: Callable[[], float]) -> float:
    """The result of a call inside of a context."""
    with context():
        return call()


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


def measure(options: Options) -> Iterator[dict[str, dict[str, Any]]]:
    """Seconds of every method and round, the copies, and what the constraint misses, of more and more models."""
    results = {}
    for name in options.models:
        given = options.compression_ratio
        for ratio in options.rank_ratios if given is None else [rank_ratio_at(name, given)]:
            case = Case(shapes_of(name, ratio, options.blocks), options.tau, any_device())
            times = in_turn(case.methods(options.methods, options.conditioning), options.rounds, options.longest)
            result = {"seconds": times, "copies_of_factors": case.peak_copies(), "errors": case.errors()}
            results[f"{name}, rank ratio {ratio:.4g}"] = result
            del case
            yield results


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each method: median, least and most, and the ratio to ours."""
    parts = []
    for label, result in results.items():
        lines, ours = [], statistics.median(result["seconds"][STEP])
        for method, values in result["seconds"].items():
            median = statistics.median(values)
            least_and_most = f"{1e3 * min(values):.3g} … {1e3 * max(values):.3g}"
            lines.append([method, f"{1e3 * median:.3g}", least_and_most, f"{median / ours:.2f} ×"])
        parts.append(markdown_table([label, "ms (median)", "spread", "against ours"], lines))
        parts.append(f"at most {result['copies_of_factors']:.2f} copies of the factors at once")
        if STEP_TF32 in result["errors"]:
            missed = [f"{name}: {x['orthonormality']:.1e}" for name, x in result["errors"].items()]
            parts.append(f"largest ‖UᵀU − I‖_F/√r after {'; after '.join(missed)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    run(Options, measure, table)
