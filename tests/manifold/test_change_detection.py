"""Factors and tolerances that others change between the steps."""

import pytest
import torch

from hf_condlr import attach_manifold_step
from hf_condlr.errors import OptimizerError
from hf_condlr.linalg import orthonormality_error
from tests.manifold.nets import (
    assert_guarantee,
    layers_of,
    make_model,
    random_gradients,
)


@pytest.mark.parametrize("ahead", [False, True])
def test_weights_loaded_between_steps_are_brought_back_at_the_next_one(ahead, monkeypatch):
    """A core of κ = 10⁸ and bases that are not orthonormal, without a word to the handle."""
    if ahead:
        monkeypatch.setattr("hf_condlr.manifold.masks.runs_ahead", lambda X: True)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    handle = attach_manifold_step(optimizer, model)
    for step in range(4):
        if step == 2:
            r = model.a.r
            state = model.state_dict() | {"a.S": torch.diag(torch.logspace(0, -8, r)), "a.U": torch.randn(24, r)}
            model.load_state_dict(state)
        random_gradients(model)
        optimizer.step()
        assert_guarantee(model, handle)


def test_a_tolerance_changed_between_steps_is_kept():
    model = make_model(2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    handle = attach_manifold_step(optimizer, model)
    for step in range(4):
        if step == 2:
            model.a.tau = 0.1
        random_gradients(model)
        optimizer.step()
        assert_guarantee(model, handle)
    assert handle.bounds()["a"] == pytest.approx(1.1)


class FailsHalfWay(torch.optim.Optimizer):
    """Moves the factors, and then has an error."""

    def __init__(self, params):
        super().__init__(params, {})
        self.failing = False

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn_like(p) if self.failing else -0.01 * p.grad)
        if self.failing:
            raise RuntimeError("half way")


@pytest.mark.parametrize("after", ["settle", "step"])
def test_an_optimizer_that_fails_half_way_is_no_harm(after):
    model = make_model()
    optimizer = FailsHalfWay(model.parameters())
    handle = attach_manifold_step(optimizer, model)
    random_gradients(model)
    optimizer.step()
    optimizer.failing = True
    with pytest.raises(RuntimeError, match="half way"):
        optimizer.step()
    with pytest.raises(OptimizerError, match="the state must be saved where the constraint holds"):
        handle.state_dict()
    optimizer.failing = False
    handle.settle() if after == "settle" else optimizer.step()
    assert_guarantee(model, handle)


def test_a_zero_core_at_the_start_trains():
    model = make_model()
    with torch.no_grad():
        model.a.S.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach_manifold_step(optimizer, model, metric_scaling=False)
    random_gradients(model)
    optimizer.step()
    assert_guarantee(model, handle)


def test_bases_rounded_to_half_precision_are_orthonormal_again_and_w_stays():
    """Also where they do not move at first: a learning rate that warms up from 0, a frozen U."""
    model = make_model().bfloat16().float()
    model.a.U.requires_grad_(False)
    W = {name: layer.matrix() for name, layer in layers_of(model).items()}
    assert orthonormality_error(model.a.U.detach()).item() > 1e-3
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    handle = attach_manifold_step(optimizer, model, warmup_steps=10)
    for name, layer in layers_of(model).items():
        torch.testing.assert_close(layer.matrix(), W[name], rtol=0, atol=1e-6)
    random_gradients(model)
    optimizer.step()
    assert_guarantee(model, handle)
