"""Optimizers and factors that the manifold step refuses."""

import pytest
import torch

from hf_condlr import CondLRConfig, attach_manifold_step, get_robust_lowrank_model
from hf_condlr.errors import OptimizerError
from tests.manifold.nets import (
    Net,
    make_model,
    random_gradients,
)


def test_half_precision_factors_are_refused_at_the_start_and_later():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_manifold_step(optimizer, model)
    model.bfloat16()
    random_gradients(model)
    for attempt in (optimizer.step, lambda: attach_manifold_step(optimizer, model)):
        with pytest.raises(OptimizerError, match=r"factors must be float32 or float64.*conv\.U \(torch\.bfloat16\)"):
            attempt()


def test_schedule_free_optimizers_are_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.eval = lambda: None
    with pytest.raises(OptimizerError, match="must not swap parameters for evaluation"):
        attach_manifold_step(optimizer, model)


def test_closures_are_refused():
    model = make_model()
    for optimizer in (torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.LBFGS(model.parameters())):
        handle = attach_manifold_step(optimizer, model)
        with pytest.raises(OptimizerError, match="without a closure"):
            optimizer.step(lambda: torch.tensor(0.0))
        with pytest.raises(OptimizerError, match="without a closure"):
            optimizer.step(closure=lambda: torch.tensor(0.0))
        handle.remove()


def test_optimizer_without_the_factors_is_refused():
    dense = Net()
    optimizer = torch.optim.AdamW(dense.parameters(), lr=0.1)  # made before the conversion: a classic
    model = get_robust_lowrank_model(dense, CondLRConfig(rank_ratio=0.5))
    with pytest.raises(OptimizerError, match=r"must hold every trainable factor; received a\.U, a\.S, a\.V"):
        attach_manifold_step(optimizer, model)


def test_attaching_twice_is_refused():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    attach_manifold_step(optimizer, model)
    with pytest.raises(OptimizerError, match="must be called once"):
        attach_manifold_step(optimizer, model)


def test_model_without_factored_layers_is_refused():
    model = Net()
    with pytest.raises(OptimizerError, match="must have factored layers"):
        attach_manifold_step(torch.optim.AdamW(model.parameters(), lr=0.1), model)


def test_frozen_core_outside_its_bound_is_refused():
    model = make_model(0.1)
    model.a.S.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with pytest.raises(OptimizerError, match=r"a frozen S must obey its bound already.*a\.S \(κ = .*bound 1\.1\)"):
        attach_manifold_step(optimizer, model)
