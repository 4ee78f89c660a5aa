"""Models with known optima, and models that notice what an attack may not touch."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

EPSILON = 0.1
LONG = 1e6  # a step after which only its direction counts


def random_states():
    _, keys, position, *_ = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), keys.tobytes(), position, random.getstate()


class Linear(nn.Module):
    """Logits W x + b of flattened inputs."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.linear.weight.data = weight
        self.linear.bias.data = torch.zeros(len(weight)) if bias is None else bias

    def forward(self, x):
        return self.linear(x.flatten(1))


def linear_problem(label, *, low=0.0, high=1.0, scale=1.0):
    """Two classes, 64 samples of the class `label` that stay in it however far an attack of these tests goes.

    Returns model, inputs (64, 3, 2, 2), labels and d = ∇(z_other − z_label), which is constant and nowhere small.
    """
    generator = torch.Generator().manual_seed(3)
    d = (0.1 + 0.2 * torch.rand(12, generator=generator)) * torch.randn(12, generator=generator).sign()
    inputs = low + (high - low) * torch.rand(64, 3, 2, 2, generator=generator)
    weight, bias = torch.randn(2, 12, generator=generator), torch.zeros(2)
    weight[1 - label] = weight[label] + d
    bias[label] = (inputs.flatten(1) @ d).max() + 0.3 * d.abs().sum() + 0.2
    return Linear(scale * weight, scale * bias), inputs, torch.full((64,), label), d


def margins(model, x, labels):
    """z_other − z_label in float64, for two classes."""
    with torch.no_grad():
        weight, bias = model.linear.weight.double(), model.linear.bias.double()
        logits = x.double().flatten(1) @ weight.mT + bias
    own = logits.gather(1, labels[:, None])[:, 0]
    return logits.scatter(1, labels[:, None], -torch.inf).amax(1) - own


def cross_entropy(model, x, labels):
    with torch.no_grad():
        return F.cross_entropy(model(x).float(), labels, reduction="none")


def perturbation(adversarial, inputs, norm):
    delta = (adversarial.double() - inputs.double()).flatten(1)
    return delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)


class Flat(nn.Module):
    """Logits that do not depend on the inputs; the gradient is zero, not missing."""

    def forward(self, x):
        return torch.stack([x.flatten(1).sum(1) * 0 + 1, x.flatten(1).sum(1) * 0], 1)


class Watched(nn.Module):
    """Everything an attack might disturb: dropout, batch norm, a frozen parameter, a submodule in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.frozen = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 2)
        self.calls, self.fails_at = 0, None
        self.frozen.requires_grad_(False)
        self.train()
        self.frozen.eval()
        self.head.weight.grad = torch.ones_like(self.head.weight)

    def forward(self, x):
        self.calls += 1
        assert not any(module.training for module in self.modules())
        assert torch.is_grad_enabled() or not x.requires_grad
        assert not torch.is_autocast_enabled("cpu")
        if self.calls == self.fails_at:
            raise RuntimeError("the model broke")
        return self.head(self.frozen(self.body(x)))

    def state(self):
        return (
            {name: module.training for name, module in self.named_modules()},
            {name: parameter.requires_grad for name, parameter in self.named_parameters()},
            {name: None if p.grad is None else p.grad.tolist() for name, p in self.named_parameters()},
            {name: value.tolist() for name, value in self.state_dict().items()},
        )
