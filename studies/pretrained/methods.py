"""What becomes of a fine-tuned model: the ways to compress it that the study compares."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from hf_condlr import Calibration, CondLRConfig, get_robust_lowrank_model
from hf_condlr.layers import factored_layers
from studies.pretrained.fwsvd import input_information, weighted_factors
from studies.pretrained.tasks import ENCODER, Task


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
    """

    label: str
    start: str
    allocation: str = "uniform"
    tau: float = math.inf
    sequential: bool = False
    free: bool = True


METHODS = {
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


def calibration(task: Task, samples: int) -> Calibration:
    """Training rows, drawn once, for starts and ranks; what was measured serves all methods."""
    return Calibration(DataLoader(_rows(task, samples), batch_size=32, collate_fn=task.collate))


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
    return model


def _rows(task: Task, samples: int) -> Any:
    return task.train.shuffle(seed=0).select(range(samples))
