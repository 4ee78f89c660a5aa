"""The soft penalty R(S) = ‖SᵀS − α²I‖_F: its gradient against autograd, and what it does in a training."""

import numpy as np
import pytest
import torch
from torch import nn

from hf_condlr import CondLRConfig, attach_manifold_step, condition_report, get_robust_lowrank_model
from studies.paper.baselines import attach_penalty, penalty_gradient, penalty_value
from tests.linalg import cases
from tests.linalg.reference import array


def value(S):
    alpha_squared = np.linalg.norm(S) ** 2 / len(S)
    return np.linalg.norm(S.T @ S - alpha_squared * np.eye(len(S)))


def differentiable_value(S):
    alpha_squared = S.square().sum() / len(S)
    return (S.mT @ S - alpha_squared * torch.eye(len(S), dtype=S.dtype)).square().sum().sqrt()


@pytest.mark.parametrize("name", cases.WELL_POSED)
def test_value(name):
    S = cases.CORES[name](5)
    expected = value(S / np.abs(S).max()) * np.abs(S).max() ** 2
    assert penalty_value(torch.from_numpy(S)).item() == pytest.approx(
        expected, rel=1e-12, abs=1e-15 * np.abs(S).max() ** 2
    )


def test_gradient_equals_autograd_for_each_core_of_a_stack():
    S = (
        torch.from_numpy(np.random.default_rng(0).standard_normal((3, 2, 5, 5)))
        * torch.tensor([1.0, 30.0])[:, None, None]
    )
    gradient = penalty_gradient(S)
    for i in np.ndindex(3, 2):
        core = S[i].clone().requires_grad_()
        differentiable_value(core).backward()
        torch.testing.assert_close(gradient[i], core.grad, rtol=1e-12, atol=1e-12)
    assert penalty_value(S).shape == (3, 2)


def test_scale():
    """R(cS) = c²R(S), ∇R(cS) = c∇R(S), without overflow."""
    S = torch.from_numpy(cases.CORES["random"](4)).float()
    torch.testing.assert_close(penalty_gradient(2.0**100 * S), 2.0**100 * penalty_gradient(S))
    torch.testing.assert_close(penalty_value(2.0**30 * S), 2.0**60 * penalty_value(S))


@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=cases.DTYPES)
@pytest.mark.parametrize("name", ["orthogonal", "huge orthogonal"])
def test_no_gradient_where_all_singular_values_are_equal(name, dtype):
    S = torch.from_numpy(cases.CORES[name](16)).to(dtype)
    assert torch.count_nonzero(penalty_gradient(S)) == 0


def test_zero_core():
    assert penalty_value(torch.zeros(3, 3)) == 0
    assert torch.equal(penalty_gradient(torch.zeros(3, 3)), torch.zeros(3, 3))


def test_half_precision_is_computed_in_float32():
    S = torch.from_numpy(cases.CORES["random"](4)).bfloat16()
    assert penalty_gradient(S).dtype == torch.bfloat16
    torch.testing.assert_close(penalty_gradient(S).float(), penalty_gradient(S.float()), rtol=1e-2, atol=0)


def factored(tau="inf", seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 8))
    return get_robust_lowrank_model(model, CondLRConfig(target_modules=["0", "2"], r=4, tau=tau))


def test_the_gradient_lands_before_the_manifold_step():
    """Without a loss, S moves by −lr β ∇R(S)."""
    model = factored()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_penalty(optimizer, model, 0.5)
    attach_manifold_step(optimizer, model)
    before = [array(layer.S) for layer in (model[0], model[2])]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for S, layer in zip(before, (model[0], model[2]), strict=True):
        expected = S - 0.05 * array(penalty_gradient(torch.from_numpy(S)))
        np.testing.assert_allclose(array(layer.S), expected, atol=1e-6)
        assert np.abs(expected - S).max() > 1e-3


def test_a_gradient_that_is_not_finite_still_holds_the_core():
    model = factored()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_penalty(optimizer, model, 0.5)
    attach_manifold_step(optimizer, model)
    before = array(model[0].S)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    np.testing.assert_array_equal(array(model[0].S), before)


def train(beta, steps=60):
    model = factored()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_penalty(optimizer, model, beta)
    attach_manifold_step(optimizer, model)
    inputs = torch.randn(64, 12, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1.5, 12)
    targets = inputs[:, :8] * torch.logspace(0.5, -1, 8)
    for _ in range(steps):
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    report = condition_report(model)
    assert report.max_orthonormality_error < 1e-5
    return report.max_condition_number


def test_the_penalty_keeps_kappa_smaller():
    free, light, heavy = (train(beta) for beta in (0.0, 0.03, 0.3))
    assert heavy < light < free
    assert heavy < 1.5 < free
