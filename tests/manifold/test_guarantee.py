"""The guarantee after every step: orthonormal bases and κ(S) within its bound."""

import pytest

from hf_condlr import attach_manifold_step
from tests.manifold.nets import (
    OPTIMIZERS,
    TAUS,
    assert_guarantee,
    layers_of,
    make_model,
    make_model_of_all_tolerances,
    random_gradients,
)


@pytest.mark.parametrize("warmup_steps", [0, 50])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_guarantee_after_every_step(optimizer, warmup_steps):
    model = make_model_of_all_tolerances()
    step = OPTIMIZERS[optimizer](model.parameters(), 0.02)
    handle = attach_manifold_step(step, model, warmup_steps=warmup_steps)
    for t in range(1, 101):
        random_gradients(model, scale=10.0 ** ((t % 5) - 2))
        step.step()
        assert handle.step_count == t
        assert_guarantee(model, handle)
    final = {name: 1 + TAUS[name.partition(".")[0]] for name in layers_of(model)}
    assert len(final) == 20
    assert handle.bounds() == pytest.approx(final)


@pytest.mark.parametrize("lr", [10.0, 1e6, 1e20])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw-fused"])
def test_guarantee_at_absurd_learning_rates(optimizer, lr):
    model = make_model(0.5)
    step = OPTIMIZERS[optimizer](model.parameters(), lr)
    for group in step.param_groups:
        group["weight_decay"] = 0.0
    handle = attach_manifold_step(step, model)
    for _ in range(20):
        random_gradients(model)
        step.step()
        assert_guarantee(model, handle)
