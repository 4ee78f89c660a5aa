"""Gradients and updates that are not finite, and cores that would vanish."""

import copy
import logging
import math

import pytest
import torch

from hf_condlr import attach_manifold_step
from hf_condlr.errors import ConditioningError
from tests.manifold.nets import (
    INF,
    OPTIMIZERS,
    assert_guarantee,
    layers_of,
    make_model,
    random_gradients,
)


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw-fused"])
def test_gradients_that_are_not_finite_change_no_factor_and_poison_no_moment(optimizer, bad, caplog):
    model = make_model()
    step = OPTIMIZERS[optimizer](model.parameters(), 0.01)
    handle = attach_manifold_step(step, model)
    random_gradients(model)
    step.step()
    before = {n: [getattr(x, k).detach().clone() for k in "USV"] for n, x in layers_of(model).items()}
    for _ in range(3):
        random_gradients(model)
        model.a.U.grad[0, 0] = bad
        model.b.S.grad[1, 1] = bad
        with caplog.at_level(logging.WARNING, logger="hf_condlr"):
            step.step()
        assert_guarantee(model, handle)
    assert torch.equal(model.a.U, before["a"][0])
    assert torch.equal(model.b.S, before["b"][1])
    assert not torch.equal(model.b.U, before["b"][0])
    for name, layer in layers_of(model).items():
        for p in (layer.U, layer.S, layer.V):
            for moment in step.state[p].values():
                assert torch.isfinite(torch.as_tensor(moment)).all(), name
    said = [r for r in caplog.records if "not finite" in r.getMessage()]
    assert len(said) == 1  # once
    assert "a.U" in said[0].getMessage() and "b.S" in said[0].getMessage()


def test_fused_optimizer_with_found_inf_is_a_skipped_step():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    handle = attach_manifold_step(optimizer, model, warmup_steps=5)
    random_gradients(model)
    model.a.U.grad[0, 0] = INF
    before = copy.deepcopy(model.state_dict())
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(1.0)  # as GradScaler sets them
    optimizer.step()
    assert handle.step_count == 0
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    optimizer.found_inf = torch.tensor(0.0)
    random_gradients(model)
    optimizer.step()
    assert handle.step_count == 1
    assert_guarantee(model, handle)


def test_update_that_makes_a_core_vanish_is_refused_and_undone():
    """The other layers, in its stack and in others, have taken the step and obey their bounds."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_manifold_step(optimizer, model)
    random_gradients(model)
    optimizer.step()
    S, other = model.a.S.detach().clone(), model.tall.S.detach().clone()
    random_gradients(model)
    model.a.S.grad = S.clone()
    with pytest.raises(ConditioningError, match=r"core S must not vanish: .* after step 2 in a\. "):
        optimizer.step()
    assert torch.equal(model.a.S, S) and not torch.equal(model.tall.S, other)
    assert handle.step_count == 2
    assert_guarantee(model, handle)


def test_metric_scaling_that_overflows_stays_out_of_the_moments():
    model = make_model()
    with torch.no_grad():
        model.a.S.mul_(1e-20)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    handle = attach_manifold_step(optimizer, model)
    random_gradients(model, scale=5.0)
    model.a.S.grad.zero_()
    optimizer.step()
    assert torch.isfinite(optimizer.state[model.a.U]["momentum_buffer"]).all()
    assert_guarantee(model, handle)
