"""Optimizers and factors that the manifold step takes or refuses."""

import pytest
import torch

from hf_condlr import CondLRConfig, attach_manifold_step, get_robust_lowrank_model
from hf_condlr.errors import OptimizerError
from tests.manifold.nets import (
    Net,
    assert_guarantee,
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


def trained(closures):
    """Losses and factors of five steps, with the closure given by position or keyword, or without one."""
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    handle = attach_manifold_step(optimizer, model)
    x, losses = torch.randn(8, 2, 5, 5), []

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    for _ in range(5):
        if closures is None:
            losses.append(closure().item())
            optimizer.step()
        else:
            losses.append((optimizer.step(closure) if closures == "args" else optimizer.step(closure=closure)).item())
        assert_guarantee(model, handle)
    return losses, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("closures", ["args", "kwargs"])
def test_a_closure_trains_as_backward_before_the_step_does(closures):
    expected, found = trained(None), trained(closures)
    assert found[0] == expected[0] and expected[0][-1] < expected[0][0]
    assert all(torch.equal(p, q) for p, q in zip(found[1], expected[1], strict=True))


class Twice(torch.optim.SGD):
    """Asks its closure again, at another point."""

    def step(self, closure):
        super().step(closure)
        closure()


def test_optimizers_that_call_a_closure_several_times_are_refused():
    model = make_model()
    optimizer = torch.optim.LBFGS(model.parameters())
    handle = attach_manifold_step(optimizer, model)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(OptimizerError, match="must not be LBFGS, which moves factors between calls of its closure"):
        optimizer.step(lambda: pytest.fail("called"))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    handle.remove()
    optimizer = Twice(model.parameters(), lr=0.1)
    handle = attach_manifold_step(optimizer, model)
    random_gradients(model)
    with pytest.raises(OptimizerError, match=r"must call its closure once in a step, .*; received a second call"):
        optimizer.step(lambda: torch.tensor(0.0))
    handle.settle()
    assert_guarantee(model, handle)


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
