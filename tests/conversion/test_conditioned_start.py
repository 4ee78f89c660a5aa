"""The best factors within the bound on κ, in the metric of a start."""

import copy

import pytest
import torch

from hf_condlr import CondLRConfig, get_robust_lowrank_model
from hf_condlr.conversion.conditioned_start import nearest_conditioned
from hf_condlr.conversion.spectra import activation_aware, fisher
from hf_condlr.errors import ConfigError
from hf_condlr.linalg import clamp_singular_values, condition_number, truncated_svd
from tests.conversion.calibration_data import batches, make_bert
from tests.conversion.reference import fisher_root, whiten

SIZE = 24


def covariance(size):
    X = torch.randn(300, size) * torch.logspace(0, -1.5, size)
    return X.mT @ X / 300


def error(W, C, F, factors):
    """‖F̃^{1/2}(W − U S Vᵀ)C^{1/2}‖_F in float64."""
    U, S, V = (factor.double() for factor in factors)
    return (fisher_root(F) @ whiten(W.double() - U @ S @ V.mT, C)).norm().item()


@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(SIZE, 16), (16, SIZE)])
def test_it_obeys_the_bound_and_is_better_than_clipping(shape, tau):
    W, C, F = torch.randn(shape), covariance(shape[1]), covariance(shape[0])
    start = fisher(W, 8, C, F)
    U, S, V = nearest_conditioned(W, start, tau, C=C, F=F)
    assert condition_number(S) <= (1 + tau) * (1 + 1e-4)
    for basis in (U, V):
        assert (basis.double().mT @ basis.double() - torch.eye(8)).norm() < 1e-5 * 8**0.5
    clipped = (start[0], clamp_singular_values(start[1], tau), start[2])
    before, after = error(W, C, F, clipped), error(W, C, F, (U, S, V))
    assert after >= error(W, C, F, start) * (1 - 1e-6)  # the unconstrained optimum
    assert after < 0.98 * before  # measured: 0.75 to 0.96


def test_scales_of_the_metric_do_not_matter():
    W, C, F = torch.randn(SIZE, 16), covariance(16), covariance(SIZE)
    start = fisher(W, 8, C, F)
    U, S, V = nearest_conditioned(W, start, 0.1, C=C, F=F)
    P, T, Q = nearest_conditioned(W, start, 0.1, C=C * 1e-20, F=F * 1e-30)
    torch.testing.assert_close(U @ S @ V.mT, P @ T @ Q.mT, rtol=1e-3, atol=1e-4)


def test_small_moves_within_the_bound_do_not_lower_the_error():
    W, C, F = torch.randn(SIZE, 16).double(), covariance(16).double(), covariance(SIZE).double()
    found = nearest_conditioned(W, fisher(W, 6, C, F), 0.1, C=C, F=F)
    least = error(W, C, F, found)
    for _ in range(100):
        U, S, V = (factor + 1e-3 * torch.randn_like(factor) * factor.norm() / factor.numel() ** 0.5 for factor in found)
        moved = torch.linalg.qr(U)[0], clamp_singular_values(S, 0.1), torch.linalg.qr(V)[0]
        assert error(W, C, F, moved) > least * (1 - 1e-3)


def test_without_a_metric_it_is_the_clipped_svd():
    W = torch.randn(12, 9)
    U, S, V = truncated_svd(W, 4)
    P, T, Q = nearest_conditioned(W, (U, S, V), 0.2, C=None, F=None)
    torch.testing.assert_close(P @ T @ Q.mT, U @ clamp_singular_values(S, 0.2) @ V.mT, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tau", [10.0, float("inf")])
def test_what_obeys_the_bound_stays_as_it_is(tau):
    W, C = torch.randn(12, 9) + 5 * torch.eye(12, 9), torch.eye(9)
    start = activation_aware(W, 4, C)
    assert all(a is b for a, b in zip(nearest_conditioned(W, start, tau, C=C, F=None), start, strict=True))


@pytest.mark.parametrize("start", ["svd", "activation_aware", "fisher", "orthogonal"])
def test_a_converted_model_obeys_its_bounds_from_the_start(start):
    model = make_bert()
    config = CondLRConfig(
        target_modules=r".*layer\.0\.attention\.self.*",
        rank_ratio=0.5,
        init_weights=start,
        conditioned_start=True,
        tau_pattern={r".*query": 0.5},
    )
    get_robust_lowrank_model(
        model, config, calibration_data=batches() if start in ("activation_aware", "fisher") else None
    )
    layers = {name: model.get_submodule(name) for name in model.condlr.report.converted}
    assert len(layers) == 3
    for name, layer in layers.items():
        assert condition_number(layer.S.detach()) <= (1.5 if name.endswith("query") else 1.1) * (1 + 1e-4)
        assert 0 < model.condlr.report.converted[name].truncation_error < 1.5
    assert start == "orthogonal" or any(condition_number(x.S.detach()) > 1.4 for x in layers.values())  # not all at 1


def test_the_option_is_a_truth_value():
    with pytest.raises(ConfigError, match="conditioned_start must be true or false; received 'yes'"):
        CondLRConfig(r=2, conditioned_start="yes")


def test_the_metric_is_that_of_the_start_and_not_of_the_ranks():
    model, data, weights = make_bert(), batches(), {}
    for conditioned in (True, False):
        config = CondLRConfig(
            target_modules=r".*layer\.0\.attention\.self.*",
            compression_ratio=0.5,
            rank_allocation="fisher",
            conditioned_start=conditioned,
        )
        layer = get_robust_lowrank_model(copy.deepcopy(model), config, calibration_data=data).bert.encoder.layer[0]
        U, S, V = (getattr(layer.attention.self.query, kind).detach() for kind in "USV")
        weights[conditioned] = U @ clamp_singular_values(S, 0.1) @ V.mT
    torch.testing.assert_close(weights[True], weights[False], rtol=1e-4, atol=1e-5)  # the clipped SVD
