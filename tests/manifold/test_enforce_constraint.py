"""`enforce_constraint`: factors that no step wrote."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hf_condlr import attach_manifold_step, enforce_constraint
from hf_condlr.errors import ConditioningError
from hf_condlr.linalg import condition_number, is_orthonormal, obeys_bound, orthonormality_error
from tests.manifold.nets import layers_of, make_model, make_model_of_all_tolerances, random_gradients


def assert_constraint(model):
    for name, layer in layers_of(model).items():
        for basis in (layer.U, layer.V):
            assert is_orthonormal(orthonormality_error(basis.detach()).item(), layer.r), name
        if math.isfinite(layer.tau):
            assert obeys_bound(condition_number(layer.S.detach()).item(), 1 + layer.tau), name
            assert layer.bound == 1 + layer.tau


def write(model, scale=0.5):
    with torch.no_grad():
        for layer in layers_of(model).values():
            for factor in (layer.U, layer.S, layer.V):
                factor += scale * torch.randn_like(factor)


def test_factors_that_were_written_obey_afterwards_and_w_moves_as_little_as_the_bound_needs():
    """Float64 reference: the singular values of W clipped to the nearest interval [a, (1 + τ) a]."""
    model = make_model_of_all_tolerances()
    write(model)
    before = {name: layer.matrix().double().detach().numpy() for name, layer in layers_of(model).items()}
    enforce_constraint(model)
    assert_constraint(model)
    for name, layer in layers_of(model).items():
        r, tau = layer.r, layer.tau
        sigma = np.linalg.svd(before[name], compute_uv=False)[:r]
        moved = np.linalg.norm(layer.matrix().double().detach().numpy() - before[name])
        if math.isinf(tau):
            assert moved <= 1e-4 * np.linalg.norm(before[name])
            continue
        grid = np.geomspace(sigma[-1] / (1 + tau), sigma[0], 4000)
        least = min(np.linalg.norm(sigma - np.clip(sigma, a, (1 + tau) * a)) for a in grid)
        assert moved == pytest.approx(least, rel=1e-3, abs=1e-4 * np.linalg.norm(sigma))


def test_what_obeys_stays_bitwise_as_it_is():
    model = make_model(0.1)
    enforce_constraint(model)
    before = copy.deepcopy(model.state_dict())
    enforce_constraint(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_average_of_a_training_leaves_the_constraint_and_comes_back(dtype):
    model = make_model(0.1, dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attach_manifold_step(optimizer, model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(30):
        random_gradients(model)
        optimizer.step()
        average.update_parameters(model)
    layers = layers_of(average).values()
    assert max(orthonormality_error(layer.U.detach()).item() for layer in layers) > 0.1
    enforce_constraint(average)
    assert_constraint(average)
    assert_constraint(model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_factors_that_are_not_finite_are_refused(value):
    model = make_model(0.1)
    with torch.no_grad():
        model.a.U[0, 0] = value
    with pytest.raises(ConditioningError, match="factors must be finite; received NaN or inf in a"):
        enforce_constraint(model)


def test_a_core_of_zeros_and_a_dense_model_are_refused():
    model = make_model(0.1)
    with torch.no_grad():
        model.b.S.zero_()
    with pytest.raises(ConditioningError, match="cores must not be zero; received that of b"):
        enforce_constraint(model)
    with pytest.raises(ConditioningError, match="must have factored layers; received none"):
        enforce_constraint(nn.Linear(3, 3))
