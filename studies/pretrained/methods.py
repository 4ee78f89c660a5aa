"""What becomes of a fine-tuned model: the ways to compress it that the study compares."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hf_condlr import Calibration, CondLRConfig, get_robust_lowrank_model
from hf_condlr.layers import factored_layers
from hf_condlr.robustness.attacks import Attack
from studies.pretrained.fwsvd import input_information, weighted_factors
from studies.pretrained.tasks import ENCODER, Task

QUERIES_AND_KEYS = r".*\.(query|key)"
MLPS = r".*\.(mlp\..*|layer\.\d+\.(intermediate|output)\.dense)"


@dataclass(frozen=True)
class Method:
    """A start, its ranks, and the bound.

    Attributes:
        label: In tables.
        start: `init_weights` of the config, `fwsvd`, or `dense`: nothing is removed.
        allocation: `rank_allocation` of the config.
        tau: κ ≤ 1 + τ from the start on; inf: no bound.
        sequential: Each layer is factored for what the compressed layers before it give.
        free: The recovery trains U, S, V without the manifold step, as plain low rank does.
        tau_pattern: Other bounds of some layers.
        cap: No singular value of S is larger than this multiple of their rms; inf: no limit.
        attacked: Every second calibration batch is attacked.
    """

    label: str
    start: str
    allocation: str = "uniform"
    tau: float = math.inf
    sequential: bool = False
    free: bool = True
    tau_pattern: dict[str, float] = field(default_factory=dict)
    cap: float = math.inf
    attacked: bool = False


COMPARED = {
    "dense": Method("dense", "dense"),
    "svd": Method("SVD, uniform ranks", "svd"),
    "fwsvd": Method("diagonal Fisher (FWSVD), uniform ranks", "fwsvd"),
    "activation-aware": Method("activation-aware, uniform ranks", "activation_aware"),
    "activation-aware-sequential": Method(
        "activation-aware, uniform ranks, sequential", "activation_aware", sequential=True
    ),
    "ours": Method("Fisher, no bound", "fisher", "fisher", free=False),
    "ours-4": Method("Fisher, κ ≤ 5", "fisher", "fisher", 4.0, free=False),
    "ours-4-sequential": Method("Fisher, κ ≤ 5, sequential", "fisher", "fisher", 4.0, sequential=True, free=False),
    "ours-1": Method("Fisher, κ ≤ 2", "fisher", "fisher", 1.0, free=False),
    "ours-0.1": Method("Fisher, κ ≤ 1.1", "fisher", "fisher", 0.1, free=False),
}
CANDIDATES = {  # of which one might buy robustness
    f"ours-{tau:g}-sequential{name}": Method(
        f"Fisher, {bound}, sequential{label}", "fisher", "fisher", tau, sequential=True, free=False, **options
    )
    for tau, bound, name, label, options in [
        (math.inf, "no bound", "", "", {}),
        (1.0, "κ ≤ 2", "", "", {}),
        (4.0, "κ ≤ 5", "-qk", ", κ ≤ 2 in queries and keys", {"tau_pattern": {QUERIES_AND_KEYS: 1.0}}),
        (4.0, "κ ≤ 5", "-mlp", ", κ ≤ 2 in the MLPs", {"tau_pattern": {MLPS: 1.0}}),
        (4.0, "κ ≤ 5", "-cap-1.5", ", σ ≤ 1.5 rms", {"cap": 1.5}),
        (4.0, "κ ≤ 5", "-attacked", ", calibrated under attack", {"attacked": True}),
    ]
}
METHODS = COMPARED | CANDIDATES


def calibration(task: Task, samples: int, model: Any = None, attack: Attack | None = None) -> Calibration:
    """Training rows, drawn once, for starts and ranks; what was measured serves all methods.

    With an attack on the dense model, every second batch of them is attacked.
    """
    batches: Iterable[Any] = DataLoader(_rows(task, samples), batch_size=32, collate_fn=task.collate)
    if attack is not None:
        batches = [task.attacked(model, attack, batch) if i % 2 else batch for i, batch in enumerate(batches)]
    return Calibration(batches)


def compressed(task: Task, dense: Any, method: Method, ratio: float, measured: Calibration, samples: int) -> Any:
    """A compressed copy of the dense model."""
    model = copy.deepcopy(dense)
    if method.start == "dense":
        return model
    config = CondLRConfig(
        target_modules=ENCODER,
        compression_ratio=ratio,
        rank_allocation=method.allocation,
        init_weights="svd" if method.start == "fwsvd" else method.start,
        tau=method.tau,
        tau_pattern=method.tau_pattern,
        sequential_calibration=method.sequential,
        conditioned_start=math.isfinite(method.tau),
    )
    model = get_robust_lowrank_model(
        model, config, calibration_data=measured if config.needs_calibration_data else None
    )
    if method.start == "fwsvd":
        layers = factored_layers(model)
        singly = DataLoader(_rows(task, samples), batch_size=1, collate_fn=task.collate)
        information = input_information(copy.deepcopy(dense), list(layers), singly)
        with torch.no_grad():
            for name, layer in layers.items():
                layer.set_factors(*weighted_factors(dense.get_submodule(name).weight, information[name], layer.r))
    if math.isfinite(method.cap):
        for layer in factored_layers(model).values():
            layer.set_factors(layer.U, capped(layer.S, method.cap), layer.V)
    return model


@torch.no_grad()
def capped(S: Tensor, cap: float) -> Tensor:  # (r, r) -> (r, r)
    """The nearest S whose singular values are at most `cap` times the rms of those of the given one."""
    P, sigma, Qt = torch.linalg.svd(S)
    return P @ (sigma.clamp(max=cap * sigma.square().mean().sqrt())[:, None] * Qt)


def _rows(task: Task, samples: int) -> Any:
    return task.train.shuffle(seed=0).select(range(samples))
