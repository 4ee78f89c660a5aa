"""Cayley SGD and projected SGD: against their formulas in float64 NumPy, and what holds after many steps."""

import numpy as np
import pytest
import torch
from torch import nn

from studies.paper.baselines import CayleySGD, ProjectedSGD, orthonormalize_, stiefel_groups
from tests.linalg import reference
from tests.linalg.reference import array

OPTIMIZERS = (CayleySGD, ProjectedSGD)
SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (6, 6), "column": (7, 1), "kernel": (4, 3, 3, 3)}


def weight(shape, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parameter = nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator))
    orthonormalize_([parameter])
    return parameter


def tall(X):
    X = X.reshape(len(X), -1)
    return X if X.shape[0] >= X.shape[1] else X.T


def cayley(X, G, M, lr, momentum, iterations, q):
    """Algorithm 1 of arXiv 2002.01113 with the p×p matrix W, then Q of a QR."""
    M = momentum * M - G
    W_hat = M @ X.T - X @ (X.T @ M @ X.T) / 2
    W = W_hat - W_hat.T
    M = W @ X
    alpha = min(lr, 2 * q / (np.linalg.norm(W) + 1e-8))
    Y = X + alpha * M
    for _ in range(iterations):
        Y = X + alpha / 2 * W @ (X + Y)
    return reference.qr(Y), M


def projected(X, G, M, lr, momentum):
    M = momentum * M + reference.project_tangent(X, G)
    return reference.qr(X - lr * M), M


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("lr", [0.05, 10.0])  # the second is cut by the contraction
def test_cayley_follows_its_formula(shape, lr):
    parameter = weight(shape)
    X, M = tall(array(parameter)), 0
    optimizer = CayleySGD([{"params": [parameter], "stiefel": True}], lr=lr, momentum=0.9, iterations=3)
    for k in range(4):
        parameter.grad = torch.from_numpy(np.random.default_rng(k).standard_normal(shape))
        X, M = cayley(X, tall(array(parameter.grad)), M, lr, 0.9, 3, 0.5)
        optimizer.step()
        np.testing.assert_allclose(tall(array(parameter)), X, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_projected_follows_its_formula(shape):
    parameter = weight(shape)
    X, M = tall(array(parameter)), 0
    optimizer = ProjectedSGD([{"params": [parameter], "stiefel": True}], lr=0.3, momentum=0.5)
    for k in range(4):
        parameter.grad = torch.from_numpy(np.random.default_rng(k).standard_normal(shape))
        X, M = projected(X, tall(array(parameter.grad)), M, 0.3, 0.5)
        optimizer.step()
        np.testing.assert_allclose(tall(array(parameter)), X, atol=1e-12)


def test_many_iterations_come_to_the_cayley_transform():
    parameter = weight((8, 3))
    X, G = array(parameter), np.random.default_rng(0).standard_normal((8, 3))
    optimizer = CayleySGD([{"params": [parameter], "stiefel": True}], lr=0.2, iterations=60)
    parameter.grad = torch.from_numpy(G)
    optimizer.step()
    W = -(G @ X.T - X @ (X.T @ G @ X.T) / 2)
    W = W - W.T
    alpha = min(0.2, 1 / np.linalg.norm(W))
    transform = np.linalg.solve(np.eye(8) - alpha / 2 * W, (np.eye(8) + alpha / 2 * W) @ X)
    assert reference.orthonormality_error(transform) < 1e-13  # so the QR after it has nothing to do
    np.testing.assert_allclose(array(parameter), transform, atol=1e-13)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_weights_stay_orthonormal(optimizer_class, shape):
    parameter = weight(shape, torch.float32)
    optimizer = optimizer_class([{"params": [parameter], "stiefel": True}], lr=0.5, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for k in range(300):
        parameter.grad = 10.0 ** (k % 7 - 3) * torch.randn(shape, generator=generator)
        optimizer.step()
    X = tall(array(parameter))
    assert reference.orthonormality_error(X) < 1e-5 * X.shape[1] ** 0.5  # measured: below 1e-6


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_both_find_the_leading_subspace(optimizer_class):
    """max tr(XᵀAX) over St(10, 3): the three largest eigenvalues."""
    A = torch.diag(torch.arange(1.0, 11.0, dtype=torch.float64))
    parameter = weight((10, 3))
    optimizer = optimizer_class([{"params": [parameter], "stiefel": True}], lr=0.05, momentum=0.5)
    for _ in range(300):
        loss = -(parameter.mT @ A @ parameter).trace()
        parameter.grad = None
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx(-27.0, abs=1e-6)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_other_parameters_get_sgd(optimizer_class):
    ours, theirs = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizers = optimizer_class([ours], lr=0.1, momentum=0.9), torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for k in range(3):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = torch.tensor([1.0, -2.0, k])
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize("stiefel", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_gradient_that_is_not_usable_changes_nothing(optimizer_class, stiefel, value):
    """3e38 is finite, but its squares are not, or neither is the new value."""
    parameter = weight((6, 3), torch.float32)
    optimizer = optimizer_class([{"params": [parameter], "stiefel": stiefel}], lr=10.0, momentum=0.9)
    parameter.grad = torch.randn(6, 3)
    optimizer.step()
    value_before = parameter.detach().clone()
    state_before = optimizer.state[parameter]["momentum_buffer"].clone()
    parameter.grad = torch.full((6, 3), value)
    optimizer.step()
    assert torch.equal(parameter, value_before)
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], state_before)
    parameter.grad = torch.randn(6, 3)
    optimizer.step()
    assert parameter.isfinite().all()
    if stiefel:
        assert reference.orthonormality_error(array(parameter)) < 1e-5


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_a_zero_gradient_without_momentum_changes_nothing(optimizer_class):
    parameter = weight((6, 3))
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    optimizer_class([{"params": [parameter], "stiefel": True}], lr=0.1).step()
    torch.testing.assert_close(parameter, before, rtol=0, atol=1e-15)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_resuming_from_the_state_equals_no_interruption(optimizer_class):
    def run(interrupted):
        parameter = weight((4, 3, 2, 2))
        make = lambda: optimizer_class([{"params": [parameter], "stiefel": True}], lr=0.1, momentum=0.9)  # noqa: E731
        optimizer = make()
        for k in range(4):
            if interrupted and k == 2:
                state = optimizer.state_dict()
                optimizer = make()
                optimizer.load_state_dict(state)
            parameter.grad = torch.from_numpy(np.random.default_rng(k).standard_normal((4, 3, 2, 2)))
            optimizer.step()
        return parameter

    assert torch.equal(run(False), run(True))


def test_groups_of_a_model():
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6, 4))
    constrained, rest = stiefel_groups(model)
    assert [p.shape for p in constrained["params"]] == [(6, 2, 3, 3), (4, 6)]
    assert len(rest["params"]) == 4
    for parameter in constrained["params"]:
        assert reference.orthonormality_error(tall(array(parameter))) < 1e-5
    optimizer = CayleySGD([constrained, rest], lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(3, 2, 3, 3)).square().sum().backward()
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert all(moved)


def test_orthonormalize_takes_the_nearest():
    W = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 3)))
    parameter = nn.Parameter(W.clone())
    orthonormalize_([parameter])
    np.testing.assert_allclose(array(parameter), reference.polar(array(W)), atol=1e-13)
