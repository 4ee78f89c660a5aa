"""Where the time of one training step under CondLR goes: forward, backward, optimizer, parts of the manifold step.

Taken with `torch.profiler` from ranges of `record_function`; on CUDA each range waits for the device at both ends, so
that its time is the device's too. The manifold step is what runs between two hooks around its own. Its parts are sums
over torch's operators: matrix products; factorisations (Cholesky, triangular inverses, eigenvalues); copies; and all
else: elementwise operators, checks for finite values, and Python.

The floor is the bare matrix products: two projections, a Gram matrix and the product with its inverse factor for each U
and V, one factor after the other, after each step. Times are means over all steps: on a shared
machine long ranges are interrupted more often than short ones, so that medians would distort the shares.

    python -m benchmarks.profile_step --models minilm
    python -m benchmarks.profile_step --models vit-b16 --batch_size 128 --dtype bfloat16
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.timing import run
from benchmarks.training_step import Options, Step
from hf_condlr import LowRankLinear, attach_manifold_step
from hf_condlr.tables import markdown_table
from studies.record import any_device

OPERATORS = {
    "matrix products": {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"},
    "factorisations": {
        *("aten::linalg_cholesky_ex", "aten::linalg_solve_triangular", "aten::linalg_eigh", "aten::_linalg_eigh"),
        *(
            "aten::triangular_solve",
            "aten::linalg_qr",
            "aten::_linalg_svd",
            "aten::geqrf",
            "aten::linalg_householder_product",
        ),
    },
    "copies": {"aten::cat", "aten::copy_", "aten::_foreach_copy_"},
}
MANIFOLD = "manifold step"
FLOOR = "floor: the bare products"
REST = "elementwise, checks and Python"


@contextmanager
def named(name: str, device: torch.device) -> Iterator[None]:
    """A range of the profile, from an idle device to an idle device."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    with record_function(name):
        yield
        wait()


def attach_in_ranges(step: Step, device: torch.device) -> None:
    """The manifold step, between hooks that open and close a range: torch runs hooks in the order of registration."""
    open_ranges = ExitStack()

    def enter(*_: Any) -> None:
        open_ranges.enter_context(named(MANIFOLD, device))

    def leave(*_: Any) -> None:
        open_ranges.close()

    step.optimizer.register_step_pre_hook(enter)
    step.optimizer.register_step_post_hook(enter)
    attach_manifold_step(step.optimizer, step.model)
    step.optimizer.register_step_pre_hook(leave)
    step.optimizer.register_step_post_hook(leave)


def profiled(step: Step, device: torch.device) -> dict[str, float]:
    """{part: seconds} of one training step."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as recorded:
        with named("forward", device):
            loss = step.loss()
        with named("backward", device):
            loss.backward()
        with named("optimizer", device):
            step.optimizer.step()
        step.optimizer.zero_grad()
        with named(FLOOR, device):
            bare_products(step.model)
    totals = dict.fromkeys(("forward", "backward", "optimizer", MANIFOLD, *OPERATORS, REST, FLOOR), 0.0)
    part_of = {operator: part for part, operators in OPERATORS.items() for operator in operators}
    for event in recorded.events():
        if event.device_type.name != "CPU":
            continue  # a range appears once more as the device's
        if event.name in totals:
            totals[event.name] += event.cpu_time_total / 1e6
        elif event.name in part_of and _in_manifold_step(event):
            own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            totals[part_of[event.name]] += own / 1e6
    totals["optimizer"] -= totals[MANIFOLD]
    totals[REST] = totals[MANIFOLD] - sum(totals[part] for part in OPERATORS)
    return totals


def _in_manifold_step(event: Any) -> bool:
    while (event := event.cpu_parent) is not None:
        if event.name == MANIFOLD:
            return True
    return False


@torch.no_grad()
def bare_products(model: torch.nn.Module) -> None:
    """The matrix products of the step, 12(m + n)r² operations a layer."""
    for layer in model.modules():
        if isinstance(layer, LowRankLinear):
            for U in (layer.U, layer.V):
                for _ in range(3):  # the projections of gradient and displacement; the Gram matrix and X L⁻ᵀ
                    U @ (U.mT @ U)


def measure(options: Options) -> Iterator[dict[str, list[dict[str, float]]]]:
    """Seconds of every part and round, after two that warm up, of more and more models."""
    device: torch.device = any_device()
    results: dict[str, list[dict[str, float]]] = {}
    for name in options.models:
        step = Step("low rank", name, options, device)
        attach_in_ranges(step, device)
        title = f"{name}, {step.tokens:,} tokens, {options.dtype}, {device.type}"
        results[title] = [profiled(step, device) for _ in range(options.rounds + 2)][2:]
        yield results


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Milliseconds and shares of the training step and of the manifold step."""
    tables = []
    for title, found in results.items():
        means = {part: sum(times[part] for times in found) / len(found) for part in found[0]}
        total = sum(means[part] for part in ("forward", "backward", "optimizer", MANIFOLD))
        lines = []
        for part, mean in means.items():
            own = part not in ("forward", "backward", "optimizer")
            label = f"– {part}" if own and part != MANIFOLD else part
            share = f"{mean / means[MANIFOLD]:.0%}" if own else ""
            lines.append([label, f"{1e3 * mean:,.1f}", f"{mean / total:.1%}", share])
        tables.append(markdown_table([title, "ms", "of the training step", "of the manifold step"], lines, align="lr"))
    return "\n\n".join(tables)


if __name__ == "__main__":
    run(Options, measure, table)
