"""Small models, their gradients, and the guarantee that the tests of the manifold step check."""

import math

import torch
from torch import nn

from hf_condlr import CondLRConfig, get_robust_lowrank_model
from hf_condlr.layers import LowRankLayer
from hf_condlr.linalg import condition_number, is_orthonormal, obeys_bound, orthonormality_error
from tests.linalg.reference import array

INF = math.inf


class Net(nn.Module):
    """Two pairs of equal shapes, a tall one, a convolution, and a dense layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)
        self.tall = nn.Linear(24, 10)
        self.dense = nn.Linear(10, 3)

    def forward(self, x):
        x = torch.tanh(self.conv(x)).mean((2, 3)).repeat(1, 4)
        return self.dense(torch.tanh(self.tall(torch.tanh(self.b(torch.tanh(self.a(x)))))))


def make_model(tau=0.1, dtype=torch.float32, **kwargs):
    config = CondLRConfig(target_modules=["conv", "a", "b", "tall"], tau=tau, **({"rank_ratio": 0.4} | kwargs))
    return get_robust_lowrank_model(Net().to(dtype), config)


def layers_of(model):
    """{name: factored layer}."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}


def random_gradients(model, scale=1.0):
    """Normal gradients of standard deviation `scale` for every parameter."""
    for p in model.parameters():
        p.grad = torch.randn_like(p) * scale


def assert_guarantee(model, handle):
    """‖UᵀU−I‖_F ≤ 1e-5 √r (measured: 5e-7 √r), κ(S) ≤ bound (1+1e-4) (measured excess: 1e-6 for τ = 0, else none)."""
    for name, bound in handle.bounds().items():
        layer = model.get_submodule(name)
        assert layer.bound == bound
        for basis in (layer.U, layer.V):
            assert is_orthonormal(orthonormality_error(basis.detach()).item(), layer.r), name
        assert torch.isfinite(layer.S).all(), name
        if math.isfinite(bound):
            assert obeys_bound(condition_number(layer.S.detach()).item(), bound), name


OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=False, fused=False),
    "adamw-foreach": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True),
    "adamw-fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
    "adafactor": lambda p, lr: torch.optim.Adafactor(p, lr=lr),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr, momentum=0.5),
}


TAUS = {"tau_0": 0.0, "tau_01": 0.1, "tau_05": 0.5, "tau_3": 3.0, "tau_inf": INF}


def make_model_of_all_tolerances():
    """Every τ on a square, a tall, a wide layer and a convolution; never run forward."""

    def block():
        return nn.ModuleDict(
            {
                "square": nn.Linear(20, 20),
                "tall": nn.Linear(8, 24),
                "wide": nn.Linear(24, 8),
                "conv": nn.Conv2d(3, 8, 3),
            }
        )

    config = CondLRConfig(
        target_modules=["square", "tall", "wide", "conv"],
        rank_ratio=0.4,
        rank_pattern={"tau_0.wide": 1, "tau_3.wide": 1.0},
        tau_pattern={rf"{name}\..*": tau for name, tau in TAUS.items()},
    )
    return get_robust_lowrank_model(nn.ModuleDict({name: block() for name in TAUS}), config)


def train(model, optimizer, steps, start=0):
    """Steps on random batches; step t always has the same one."""
    for t in range(start, start + steps):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(8, 2, 5, 5, generator=generator)
        y = torch.randint(0, 3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def factors_of(model):
    """{layer: [U, S, V]} as arrays."""
    return {name: [array(getattr(layer, k)) for k in "USV"] for name, layer in layers_of(model).items()}
