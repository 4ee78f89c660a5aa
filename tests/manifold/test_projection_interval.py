"""Projection after every k-th step: what holds between the projections, and settling."""

import copy
import logging
import math

import numpy as np
import pytest
import torch

from hf_condlr import attach_manifold_step
from hf_condlr.errors import ConditioningError, OptimizerError
from hf_condlr.linalg import orthonormality_error
from tests.linalg.reference import array, manifold_step, project_horizontal, qr
from tests.manifold.nets import (
    INF,
    OPTIMIZERS,
    assert_guarantee,
    factors_of,
    layers_of,
    make_model,
    random_gradients,
    train,
)


@pytest.mark.parametrize("warmup_steps", [0, 10])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw-fused", "adafactor"])
def test_guarantee_after_every_third_step_and_after_settling(optimizer, warmup_steps):
    """In between the bases are not orthonormal and no bound is in force; the schedule counts optimizer steps."""
    model = make_model(0.5)
    step = OPTIMIZERS[optimizer](model.parameters(), 0.05)
    handle = attach_manifold_step(step, model, warmup_steps=warmup_steps, projection_interval=3)
    initial = handle.schedule.initial_condition
    for t in range(1, 15):
        random_gradients(model)
        step.step()
        p = min(1, t / warmup_steps) if warmup_steps else 1
        for name, bound in handle.bounds().items():
            assert bound == pytest.approx(initial[name] ** (1 - p) * 1.5**p)
        if t % 3:
            assert orthonormality_error(model.a.U.detach()).item() > 1e-3
            assert model.a.bound == INF
        if t == 7:
            handle.settle()
        if t % 3 == 0 or t == 7:
            assert_guarantee(model, handle)
            before = copy.deepcopy(model.state_dict())
            handle.settle()
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("settle_at", [None, 2])
def test_the_accumulated_displacement_is_brought_back(settle_at):
    """Three SGD steps with weight decay in NumPy: gradients projected at U₀, one projection of what they add up to.

    In float64 to 1e-10 (measured: 2e-14), also where the interval ends early.
    """
    torch.manual_seed(3)
    lr, decay, bound = 0.05, 0.3, 1.4
    model = make_model(bound - 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=decay)
    handle = attach_manifold_step(optimizer, model, metric_scaling=False, projection_interval=3)
    start = factors_of(model)
    now = copy.deepcopy(start)
    for t in range(1, 4):
        random_gradients(model)
        gradients = {n: [array(getattr(x, k).grad) for k in "USV"] for n, x in layers_of(model).items()}
        optimizer.step()
        for name, (U, S, V) in now.items():
            G_U, G_S, G_V = gradients[name]
            G_U, G_V = project_horizontal(start[name][0], G_U), project_horizontal(start[name][2], G_V)
            now[name] = [X - lr * (G + decay * X) for X, G in ((U, G_U), (S, G_S), (V, G_V))]
        if t == settle_at:
            handle.settle()
        if t in (settle_at, 3):
            for name in now:
                now[name] = manifold_step(*start[name], *now[name], bound, "nearest", retraction=qr)
            start = copy.deepcopy(now)
        for name, expected in now.items():
            for found, value in zip(factors_of(model)[name], expected, strict=True):
                assert np.abs(found - value).max() < 1e-10, (t, name)


def test_what_is_not_finite_between_projections_costs_that_step_only(caplog):
    """A held factor keeps what the steps before it in the interval gained, not only its last projection."""
    model = make_model()
    step = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    handle = attach_manifold_step(step, model, projection_interval=4)
    start = factors_of(model)
    for t in range(1, 5):
        random_gradients(model)
        if t in (2, 4):
            model.a.U.grad[0, 0] = math.nan
            model.b.S.grad[1, 1] = INF
        before = copy.deepcopy(model.state_dict())
        with caplog.at_level(logging.WARNING, logger="hf_condlr"):
            step.step()
        if t == 2:
            assert torch.equal(model.a.U, before["a.U"]) and torch.equal(model.b.S, before["b.S"])
            assert not torch.equal(model.b.U, before["b.U"])
    assert caplog.text.count("not finite") == 1
    assert_guarantee(model, handle)
    U = start["a"][0]
    expected = qr(U + project_horizontal(U, array(before["a.U"]) - U))
    assert np.abs(array(model.a.U) - expected).max() < 1e-5
    assert np.abs(expected - U).max() > 1e-3


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_an_update_that_is_not_finite_never_enters_between_projections(bad):
    model = make_model()
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach_manifold_step(step, model, projection_interval=3)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        random_gradients(model)
        step.param_groups[0]["lr"] = bad
        step.step()
    handle.settle()
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.U, before[f"{name}.U"]) and torch.equal(layer.V, before[f"{name}.V"])
    assert_guarantee(model, handle)


def test_a_core_that_vanished_goes_back_to_the_last_projection():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_manifold_step(optimizer, model, projection_interval=2)
    for _ in range(2):
        random_gradients(model)
        optimizer.step()
    S = model.a.S.detach().clone()
    random_gradients(model)
    model.a.S.grad = S.clone()
    optimizer.step()
    with pytest.raises(ConditioningError, match=r"must not vanish: .* after step 3 in a\. "):
        handle.settle()
    assert torch.equal(model.a.S, S)
    assert_guarantee(model, handle)


def test_factors_that_lose_their_gradient_are_brought_back_too():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    handle = attach_manifold_step(optimizer, model, projection_interval=4)
    for t in range(1, 5):
        random_gradients(model)
        if t > 2:
            model.a.S.requires_grad_(False)
            for p in (*model.b.parameters(), model.a.S):
                p.grad = None
        optimizer.step()
        if t == 2:
            assert orthonormality_error(model.b.U.detach()).item() > 1e-3
    assert_guarantee(model, handle)


def test_resume_within_an_interval_equals_settling_there():
    """Saved at step 5 of intervals of 4: bit for bit what a training is that settles at step 5 and goes on."""
    torch.manual_seed(0)
    start = make_model()

    def fresh(of):
        optimizer = torch.optim.AdamW(of.parameters(), lr=0.01)
        return optimizer, attach_manifold_step(optimizer, of, warmup_steps=9, projection_interval=4)

    whole, resumed = copy.deepcopy(start), copy.deepcopy(start)
    optimizer, handle = fresh(whole)
    train(whole, optimizer, 5)
    with pytest.raises(
        OptimizerError, match=r"saved where the constraint holds; received step 5, between .*Call settle\(\)"
    ):
        handle.state_dict()
    handle.settle()
    saved = copy.deepcopy({"m": whole.state_dict(), "o": optimizer.state_dict(), "h": handle.state_dict()})
    train(whole, optimizer, 7, start=5)
    optimizer, handle = fresh(resumed)
    resumed.load_state_dict(saved["m"])
    optimizer.load_state_dict(saved["o"])
    handle.load_state_dict(saved["h"])
    train(resumed, optimizer, 7, start=5)
    assert_guarantee(resumed, handle)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_loading_a_state_forgets_the_interval():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = attach_manifold_step(optimizer, model, projection_interval=5)
    weights, state = copy.deepcopy(model.state_dict()), handle.state_dict()
    random_gradients(model)
    optimizer.step()
    model.load_state_dict(weights)
    handle.load_state_dict(state)
    handle.settle()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_removing_settles():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = attach_manifold_step(optimizer, model, projection_interval=5)
    random_gradients(model)
    optimizer.step()
    handle.remove()
    assert_guarantee(model, handle)


@pytest.mark.parametrize("interval", [0, -1, 2.0, True, "4"])
def test_projection_interval_must_count(interval):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(OptimizerError, match="projection_interval must be an integer ≥ 1; received"):
        attach_manifold_step(optimizer, model, projection_interval=interval)


def test_a_state_loaded_between_projections_promises_nothing():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_manifold_step(optimizer, model, projection_interval=4)
    for step in range(7):
        if step == 4:
            state = handle.state_dict()
        random_gradients(model)
        optimizer.step()
    handle.load_state_dict(state)
    assert model.a.bound == INF


def test_factors_converted_between_projections_are_brought_back():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = attach_manifold_step(optimizer, model, projection_interval=4)
    for _ in range(6):
        random_gradients(model)
        optimizer.step()
    model.double()
    for p in model.parameters():
        p.grad = None
    handle.settle()
    assert_guarantee(model, handle)
