"""The methods that are compared: how each makes its model and its optimizer from the same dense start."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from hf_condlr import CondLRConfig, attach_manifold_step, condition_report, get_robust_lowrank_model, is_factored
from studies.paper.baselines import CayleySGD, ProjectedSGD, attach_penalty, stiefel_groups
from studies.paper.lenet5 import LAST_LAYER, LeNet5

MOMENTUM = 0.3
FULL_RANK = {"dense": SGD, "cayley": CayleySGD, "projected": ProjectedSGD}
NAMES = "dense, unconstrained, svd_prune, cayley, projected, tau=NUMBER, tau=NUMBER:CENTER or penalty=BETA"


@dataclass(frozen=True)
class Method:
    """What a name on the command line stands for.

    Attributes:
        kind: `dense`, `cayley`, `projected`, `svd_prune`, `unconstrained`, `tau` or `penalty`.
        tau: Conditioning tolerance of the kind `tau`; inf: orthonormal bases only.
        center: The interval that the kind `tau` clips singular values to.
        beta: Weight of the kind `penalty`.
    """

    kind: str
    tau: float = math.inf
    center: str = "nearest"
    beta: float = 0.0

    @classmethod
    def parse(cls, name: str) -> "Method":
        """From its name, such as `tau=0.1:mean`.

        Raises:
            ValueError: There is no such method, or the library refuses its number.
        """
        kind, _, value = name.partition("=")
        if kind == "tau" and value:
            number, _, center = value.partition(":")
            config = CondLRConfig(r=1, tau=float(number), center=center or "nearest")
            return cls("tau", config.tau, config.center)
        if kind == "penalty" and value and 0 <= float(value) < math.inf:
            return cls("penalty", beta=float(value))
        if name in (*FULL_RANK, "svd_prune", "unconstrained"):
            return cls(name)
        raise ValueError(f"a method must be one of {NAMES}; received {name!r}")

    @property
    def has_rank(self) -> bool:
        """Whether the method takes a rank ratio."""
        return self.kind not in FULL_RANK

    @property
    def label(self) -> str:
        """The method's name in tables."""
        if self.kind == "tau" and math.isinf(self.tau):
            return "orthonormal U, V (τ = ∞)"
        if self.kind == "tau":
            return f"CondLR τ = {self.tau:g}" + ("" if self.center == "nearest" else f", {self.center}")
        if self.kind == "penalty":
            return f"soft penalty β = {self.beta:g}"
        labels = {"svd_prune": "SVD prune", "cayley": "Cayley SGD", "projected": "projected SGD"}
        return labels.get(self.kind, self.kind)

    @property
    def has_step(self) -> bool:
        """Whether the manifold step keeps its bases orthonormal."""
        return self.kind in ("tau", "penalty")


def build_model(
    method: Method, seed: int, rank_ratio: float | None, ranks: Mapping[str, float] | None = None
) -> nn.Module:
    """A fresh model: for one seed the same dense weights, and the same random factors for all factored methods."""
    torch.manual_seed(seed)
    model = LeNet5()
    if method.kind in FULL_RANK or method.kind == "svd_prune":
        return model
    return factor(model, method, rank_ratio, "orthogonal", ranks)


def factor(
    model: nn.Module, method: Method, rank_ratio: float | None, start: str, ranks: Mapping[str, float] | None = None
) -> nn.Module:
    """Every convolution and linear layer at `rank_ratio` or its own of `ranks`, the last one at its full rank."""
    config = CondLRConfig(
        target_modules=["conv1", "conv2", "fc1", "fc2"],
        rank_ratio=rank_ratio,
        rank_pattern={LAST_LAYER: 1.0, **(ranks or {})},
        tau=method.tau,
        center=method.center,
        init_weights=start,
    )
    return get_robust_lowrank_model(model, config)


def prune(model: nn.Module, rank_ratio: float | None, ranks: Mapping[str, float] | None = None) -> nn.Module:
    """A trained dense model truncated to its largest singular values, without training after it."""
    return factor(model, Method("svd_prune"), rank_ratio, "svd", ranks)


def make_optimizer(method: Method, model: nn.Module, learning_rate: float) -> tuple[Optimizer, Any]:
    """SGD with the published momentum in the method's form, and the handle of its manifold step where it has one."""
    if method.kind in ("cayley", "projected"):
        return FULL_RANK[method.kind](stiefel_groups(model), lr=learning_rate, momentum=MOMENTUM), None
    optimizer = SGD(model.parameters(), lr=learning_rate, momentum=MOMENTUM)
    if method.kind == "penalty":
        attach_penalty(optimizer, model, method.beta)
    handle = attach_manifold_step(optimizer, model) if method.has_step else None
    return optimizer, handle


def condition_numbers(model: nn.Module) -> dict[str, float | None]:
    """κ of the weight matrix of each layer, over its r singular values where it has rank r; None if not finite."""
    kappa = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            sigma = torch.linalg.svdvals(layer.weight.detach().flatten(1).double().nan_to_num(nan=0.0))
            kappa[name] = (sigma[0] / sigma[-1]).item()
    if is_factored(model):
        kappa |= {layer.name: layer.condition_number for layer in condition_report(model).layers}
    return {name: value if math.isfinite(value) else None for name, value in kappa.items()}
