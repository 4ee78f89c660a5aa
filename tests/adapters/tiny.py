"""Tiny models with adapters, and a short training of them."""

import math

import numpy as np
import torch
from peft import get_peft_model

from hf_condlr import CondLRAdapterConfig, attach_manifold_step
from hf_condlr.layers import factored_layers
from tests.models import MODELS

ARCHITECTURES = ["llama", "bert", "gpt2", "t5"]
"""A decoder, a classifier, Conv1D layers, and a model that reads the dtype of a layer's weight."""


def base(name="llama", **overrides):
    """The model in eval mode; the same weights at each call."""
    torch.manual_seed(0)
    return MODELS[name].build(**overrides)


def adapted(model=None, *, adapter="default", **options):
    return get_peft_model(base() if model is None else model, CondLRAdapterConfig(**({"r": 2} | options)), adapter)


def loss_of(model, inputs):
    """A loss that reaches every layer: of the logits, whatever the task is."""
    return model(**inputs).logits.float().square().mean()


def trained(model, name="llama", *, steps=3, lr=1e-2, seed=0):
    """Some steps under the manifold step; the model is left as it was found otherwise."""
    torch.manual_seed(seed)
    inputs = MODELS[name].inputs()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)
    handle = attach_manifold_step(optimizer, model)
    for _ in range(steps):
        loss_of(model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    return model


def outputs(model, name="llama"):
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**MODELS[name].inputs()).logits


def assert_within_bounds(model):
    """U and V orthonormal, κ(S) ≤ 1 + τ, in float64 by NumPy."""
    layers = factored_layers(model)
    assert layers
    for name, layer in layers.items():
        U, S, V = (p.detach().double().numpy() for p in (layer.U, layer.S, layer.V))
        for basis in (U, V):
            assert np.linalg.norm(basis.T @ basis - np.eye(layer.r)) <= 1e-5 * math.sqrt(layer.r), name
        sigma = np.linalg.svd(S, compute_uv=False)
        assert math.isinf(layer.tau) or sigma[0] <= (1 + layer.tau) * (1 + 1e-4) * sigma[-1], name
