"""The bound on κ(S) during and after the warm-up, and its state."""

import math

import pytest
import torch

from hf_condlr import attach_manifold_step
from hf_condlr.errors import OptimizerError
from hf_condlr.linalg import condition_number
from hf_condlr.manifold.schedule import bound_at
from tests.manifold.nets import (
    assert_guarantee,
    layers_of,
    make_model,
    random_gradients,
)


def test_schedule_falls_geometrically_from_each_layers_own_condition():
    tau, steps = 0.1, 10
    model = make_model(tau)
    initial = {n: max(condition_number(x.S.detach()).item(), 1 + tau) for n, x in layers_of(model).items()}
    assert len(set(initial.values())) > 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    handle = attach_manifold_step(optimizer, model, warmup_steps=steps)
    for t in range(1, steps + 3):
        random_gradients(model)
        optimizer.step()
        p = min(1, t / steps)
        for name, bound in handle.bounds().items():
            assert bound == pytest.approx(initial[name] ** (1 - p) * (1 + tau) ** p)
        assert_guarantee(model, handle)


def test_schedule_starts_at_ten_thousand_at_most():
    model = make_model()
    with torch.no_grad():
        model.a.S[-1] *= 1e-9
    handle = attach_manifold_step(torch.optim.SGD(model.parameters(), lr=0.1), model, warmup_steps=5)
    assert handle.schedule.initial_condition["a"] == 1e4


def test_layer_without_gradient_stays_but_its_bound_tightens():
    model = make_model(0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = attach_manifold_step(optimizer, model, warmup_steps=4)
    U = model.b.U.detach().clone()
    for _ in range(4):
        random_gradients(model)
        for p in model.b.parameters():
            p.grad = None
        optimizer.step()
        assert_guarantee(model, handle)
    assert torch.equal(model.b.U, U)


def test_core_frozen_in_the_warm_up_still_follows_its_bound():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = attach_manifold_step(optimizer, model, warmup_steps=6)
    for t in range(8):
        model.b.S.requires_grad_(t < 2)
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()
        assert_guarantee(model, handle)
    assert handle.bounds()["b"] == pytest.approx(1.1)


def test_equal_shapes_with_different_centers_and_tolerances():
    model = make_model(tau_pattern={"b": 2.0})
    model.b.center = "rms"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = attach_manifold_step(optimizer, model)
    for _ in range(5):
        random_gradients(model)
        optimizer.step()
        assert_guarantee(model, handle)
    assert handle.bounds()["a"] == pytest.approx(1.1)
    assert handle.bounds()["b"] == pytest.approx(3.0)
    assert condition_number(model.b.S.detach()).item() > 1.2


@pytest.mark.parametrize("steps", [-1, 0.5])
def test_warmup_steps_must_count(steps):
    model = make_model()
    with pytest.raises(OptimizerError, match="warmup_steps must be an integer ≥ 0"):
        attach_manifold_step(torch.optim.AdamW(model.parameters(), lr=0.1), model, warmup_steps=steps)


def test_the_formula_of_one_bound_is_that_of_many():
    initial, final = torch.tensor([8.0, 1.1, 1e4]).double(), torch.tensor([1.1, 1.1, 1.0]).double()
    for p in (0.0, 0.3, 1.0):
        alone = [bound_at(*pair, p) for pair in zip(initial.tolist(), final.tolist(), strict=True)]
        torch.testing.assert_close(bound_at(initial, final, p), torch.tensor(alone).double())
    assert bound_at(8.0, 1.1, 0.0) == 8.0
    assert bound_at(8.0, 1.1, 1.0) == 1.1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"warmup_steps": -1}, "warmup_steps must be an integer ≥ 0; received -1"),
        ({"step_count": 2.5}, "step_count must be an integer ≥ 0; received 2.5"),
        ({"initial_condition": {"conv": 2.0, "b": 2.0, "tall": 2.0}}, "name the layers of this model; received a .* a"),
        ({"initial_condition": {"a": math.nan}}, "must start between 1 and 10000 in every layer; received a: nan"),
        ({"initial_condition": None}, "initial_condition must be a dict .* received None"),
        ({"initial_condition": {"a": "2"}}, "must start between 1 and 10000 in every layer; received a: 2"),
        ({"initial_condition": {"a": None}}, "must start between 1 and 10000 in every layer; received a: None"),
        ({"initial_condition": {"a": 0.5}}, "must start between 1 and 10000 in every layer; received a: 0.5"),
    ],
)
def test_states_out_of_range_or_of_other_layers_are_refused_and_change_nothing(change, match):
    model = make_model()
    handle = attach_manifold_step(torch.optim.SGD(model.parameters(), lr=0.1), model, warmup_steps=3)
    before = handle.state_dict()
    merged = change.get("initial_condition") or {}
    if "a" in merged:
        change = {"initial_condition": before["initial_condition"] | merged}
    with pytest.raises(OptimizerError, match=match):
        handle.load_state_dict(before | change)
    assert handle.state_dict() == before


def test_a_state_that_lacks_a_part_is_refused():
    model = make_model()
    handle = attach_manifold_step(torch.optim.SGD(model.parameters(), lr=0.1), model)
    state = handle.state_dict()
    state.pop("warmup_steps")
    for wrong in (state, None, [1, 2]):
        with pytest.raises(OptimizerError, match=r"must be that of a manifold step; received no .*warmup_steps"):
            handle.load_state_dict(wrong)
