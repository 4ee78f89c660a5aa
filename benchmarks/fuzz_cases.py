"""Cases of `fuzz.py` as plain values that print as code, and how one is run against the manifold step and checked.

After every step, in float64 and by NumPy: ‖UᵀU − I‖_F ≤ 1e-5 √r, likewise V; κ(S) ≤ (1 + τ(t))(1 + 1e-4); every factor
and the optimizer's state of it are finite. Between two projections only the last two hold. The only error allowed is
the documented one of a core that would vanish, and the model must obey after it, too.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from benchmarks.fuzz_optimizers import OPTIMIZERS
from hf_condlr import CondLRConfig, attach_manifold_step, get_robust_lowrank_model
from hf_condlr.adapters.layer import CondLRLinear
from hf_condlr.errors import ConditioningError
from hf_condlr.layers import factored_layers

INF = math.inf


@dataclass(frozen=True)
class Layer:
    """A layer before its conversion; `kernel` makes it a convolution, `adapter` gives it an update beside it."""

    m: int
    n: int
    r: int
    tau: float = 0.1
    kernel: int = 0
    conv1d: bool = False
    core: str = "as it is"
    adapter: bool = False


@dataclass(frozen=True)
class Step:
    """Optimizer steps: gradients of one kind, except for the factors that `others` names by their number."""

    seed: int
    gradient: str = "normal"
    others: tuple[tuple[int, str], ...] = ()
    times: int = 1


@dataclass(frozen=True)
class Do:
    """An event between two steps; `number` chooses a layer or a factor, `value` is the event's argument."""

    what: str
    number: int = 0
    value: float | str = 0.0


@dataclass(frozen=True)
class Case:
    """A model, its optimizer and what happens to them."""

    layers: tuple[Layer, ...]
    events: tuple[Step | Do, ...]
    optimizer: str = "adamw"
    lr: float = 1e-2
    weight_decay: float = 0.0
    center: str = "nearest"
    warmup_steps: int = 0
    interval: int = 1
    metric_scaling: bool | None = None
    double: bool = False
    ahead: bool = False
    """The step as a GPU takes it: masks in place of branches, matrix products in place of factorisations."""


def _entry(G: Tensor, value: float) -> Tensor:
    G.view(-1)[G.numel() // 2] = value
    return G


# kind: (noise of the factor's shape, the factor) -> gradient
GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor | None]] = {
    "normal": lambda G, p: G,
    "small": lambda G, p: 1e-6 * G,
    "zero": lambda G, p: 0 * G,
    "none": lambda G, p: None,
    "one NaN": lambda G, p: _entry(G, math.nan),
    "one inf": lambda G, p: _entry(G, INF),
    "one -inf": lambda G, p: _entry(G, -INF),
    "all NaN": lambda G, p: torch.full_like(G, math.nan),
    "1e10": lambda G, p: 1e10 * G,
    "1e19": lambda G, p: 1e19 * G,
    "1e30": lambda G, p: 1e30 * G,
    "largest": lambda G, p: torch.full_like(G, torch.finfo(G.dtype).max),
    "1e-30": lambda G, p: 1e-30 * G,
    "denormal": lambda G, p: torch.full_like(G, torch.finfo(G.dtype).tiny / 8),
    "rank one": lambda G, p: G[:, :1] @ G[:1],
    "equal columns": lambda G, p: G[:, :1].expand_as(G).clone(),
    "decades": lambda G, p: G * torch.logspace(-15, 15, G.numel(), dtype=G.dtype).view_as(G),
    "itself": lambda G, p: p.detach().clone(),
    "one entry": lambda G, p: _entry(0 * G, 1e6),
}


def _spectrum(S: Tensor, sigma: Tensor) -> Tensor:
    P, _, Qh = np.linalg.svd(np.random.default_rng(S.shape[0]).standard_normal(S.shape))
    return torch.from_numpy(P * sigma.numpy() @ Qh)


# kind: S -> S
CORES: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda S: S,
    "identity": lambda S: torch.eye(S.shape[0]),
    "eight decades": lambda S: _spectrum(S, torch.logspace(0, -8, S.shape[0], dtype=torch.float64)),
    "three decades": lambda S: _spectrum(S, torch.logspace(0, -3, S.shape[0], dtype=torch.float64)),
    "huge": lambda S: 1e12 * (S / S.abs().max().clamp_min(1)),
    "tiny": lambda S: 1e-12 * (S / S.abs().max().clamp_min(1e-12)),
    "rank one": lambda S: torch.ones_like(S),
    "zero": lambda S: 0 * S,
}


def build(case: Case) -> nn.ModuleList:
    """The converted model, never run forward."""
    model = nn.ModuleList()
    for x in case.layers:
        linear = Conv1D(x.m, x.n) if x.conv1d else nn.Linear(x.n, x.m)
        model.append(nn.Conv2d(x.n, x.m, x.kernel) if x.kernel else linear)
    model.to(torch.float64 if case.double else torch.float32)
    converted = [str(i) for i, layer in enumerate(case.layers) if not layer.adapter]
    config = CondLRConfig(
        target_modules=converted or ["none"],
        rank_ratio=0.5,
        rank_pattern={f"^{i}$": layer.r for i, layer in enumerate(case.layers)},
        tau_pattern={f"^{i}$": layer.tau for i, layer in enumerate(case.layers)},
        center=case.center,  # type: ignore[arg-type]
    )
    if converted:
        get_robust_lowrank_model(model, config)
    for i, x in enumerate(case.layers):
        if x.adapter:
            model[i] = CondLRLinear(model[i].requires_grad_(False))
            model[i].update_layer("default", r=x.r, tau=x.tau, scale=1.0)
            model[i].condlr_factors["default"].center = case.center
    with torch.no_grad():
        for module, layer in zip(factored_layers(model).values(), case.layers, strict=True):
            module.S.copy_(CORES[layer.core](module.S.detach()))
    return model


class Run:
    """A case while it runs."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        self.model = build(case)
        self.layers = factored_layers(self.model)
        self.factors = [getattr(layer, k) for layer in self.layers.values() for k in "USV"]
        self.optimizer = OPTIMIZERS[case.optimizer](list(self.model.parameters()), case.lr, case.weight_decay)
        self.handle = attach_manifold_step(
            self.optimizer,
            self.model,
            warmup_steps=case.warmup_steps,
            metric_scaling=case.metric_scaling,
            projection_interval=case.interval,
        )
        self.kept = self.states()
        self.steps = self.refused = 0
        self.settled = True  # no step since the last projection
        self.vanished: set[str] = set()  # layers that were refused

    def states(self) -> tuple[dict, dict, dict]:
        """The states of model, optimizer and schedule."""
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), self.handle.state_dict()))

    def step(self, step: Step, seed: int) -> None:
        """Gradients, the step, and the check of its result."""
        generator = torch.Generator().manual_seed(seed)
        others = dict(step.others)
        for p in self.model.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype) if p.requires_grad else None
        for i, p in enumerate(self.factors):
            if p.grad is not None:
                p.grad = GRADIENTS[others.get(i, step.gradient)](p.grad, p)
        with self.refusals():
            self.optimizer.step()
            if self.case.ahead:
                self.handle.check()
        self.steps += 1
        self.settled = self.handle.step_count % self.case.interval == 0
        self.check()

    def do(self, event: Do) -> None:
        """What happens between steps."""
        layer = list(self.layers.values())[event.number % len(self.layers)]
        factor = self.factors[event.number % len(self.factors)]
        if event.what == "tau":
            layer.tau = float(event.value)
        elif event.what == "lr":
            for group in self.optimizer.param_groups:
                if group["lr"] is not None:  # Adafactor may choose it itself
                    group["lr"] = type(group["lr"])(event.value)
        elif event.what == "freeze":
            factor.requires_grad_(not factor.requires_grad)
        elif event.what == "write":
            with torch.no_grad():
                layer.S.copy_(CORES[str(event.value)](layer.S.detach()))
        elif event.what == "data":  # past torch's version counter
            factor.data.mul_(1.5).view(-1)[0].add_(0.01)
        elif event.what == "bases":
            with torch.no_grad():
                layer.U.normal_()
                layer.V.mul_(1.01)
        else:
            moved, self.settled = not self.settled, True
            with self.refusals():
                self.handle.settle()
            if moved:
                self.check()
            if event.what == "keep":
                self.kept = self.states()
            elif event.what in ("reload", "return"):
                states = copy.deepcopy(self.kept) if event.what == "return" else self.states()
                for holder, state in zip((self.model, self.optimizer, self.handle), states, strict=True):
                    holder.load_state_dict(state)

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """Counts the documented refusals of a core that would vanish."""
        try:
            yield
        except ConditioningError as error:
            self.refused += 1
            named = re.search(r"a core S must not vanish.* in ([\w., ]+)\. Lower", str(error))
            assert named, error
            self.vanished |= set(named.group(1).split(", "))

    def check(self) -> None:
        """The invariants, where they are promised."""
        for p in self.factors:
            assert torch.isfinite(p).all(), "a factor is not finite"
            for key, value in self.optimizer.state.get(p, {}).items():
                # Adafactor's RMS and ASGD's ax are of the factor as their step left it, at a rate of 1e20 say, and
                # enter no later step.
                if value is not None and key not in ("RMS", "ax"):
                    assert torch.isfinite(torch.as_tensor(value)).all(), f"{key} of the optimizer is not finite"
        if self.steps and self.settled:
            for name, bound in self.handle.bounds().items():
                self.check_layer(name, bound)

    def check_layer(self, name: str, bound: float) -> None:
        """Orthonormal bases, and κ within the bound that the layer states."""
        layer = self.layers[name]
        for kind, basis in (("U", layer.U), ("V", layer.V)):
            Q = basis.detach().double().numpy()
            error = float(np.linalg.norm(Q.T @ Q - np.eye(layer.r)))
            assert error <= 1e-5 * math.sqrt(layer.r), f"‖{kind}ᵀ{kind} − I‖ = {error:.3g} in layer {name}"
        assert layer.bound == bound, f"layer {name} states {layer.bound}, not {bound}"
        S = layer.S.detach().double().numpy()
        if not S.any():  # written as zero by the case; nothing to condition
            assert math.isinf(bound) or name in self.vanished, f"layer {name} is zero without an error"
        elif math.isfinite(bound):
            sigma = np.linalg.svd(S / np.abs(S).max(), compute_uv=False)
            kappa = sigma[0] / sigma[-1] if sigma[-1] > 0 else INF
            assert kappa <= bound * (1 + 1e-4), f"κ = {kappa:.8g}, bound {bound:.8g} in layer {name}"


def run(case: Case) -> Run:
    """Run all events in order and check after each step; AssertionError where an invariant does not hold."""
    with contextlib.ExitStack() as stack:
        if case.ahead:
            stack.enter_context(mock.patch("hf_condlr.manifold.masks.runs_ahead", lambda X: True))
        going = Run(case)
        for i, event in enumerate(case.events):
            try:
                if isinstance(event, Step):
                    for seed in range(event.seed, event.seed + event.times):
                        going.step(event, seed)
                else:
                    going.do(event)
            except AssertionError as error:
                raise AssertionError(f"at event {i}: {error}") from None
    return going
