"""Conditioning by matrix products: against the clip by factorisation, its certificate, and what is not followed."""

import numpy as np
import pytest
import torch

from hf_condlr.linalg import clamp_singular_values, condition_number, singular_values
from hf_condlr.linalg.newton_schulz import (
    CERTIFICATE_TOLERANCE,
    LARGEST_BOUND,
    _sign,
    clip_by_products,
    clip_core_by_products,
    extreme_singular_values,
    newton_schulz,
)
from tests.linalg import cases, reference

BOUNDS = (1.0, 1.001, 1.1, 1.5, 4.0, 101.0, LARGEST_BOUND)


def core(name, r):
    S = torch.from_numpy(np.ascontiguousarray(cases.CORES[name](r)))
    return S / S.abs().max()


def near_the_bound(r, bound, step, seed=0):
    """A conditioned core after an update of relative size `step`."""
    rng = np.random.default_rng(seed)
    S = cases.with_singular_values(rng.uniform(1, bound, r), seed)
    S = torch.from_numpy(S + step * rng.standard_normal((r, r)) / np.sqrt(r))
    return S / S.abs().max()


@pytest.mark.parametrize("name", cases.CORES)
@pytest.mark.parametrize("r", [1, 2, 5, 40])
def test_extremes_bound_the_spectrum_from_outside_and_are_close(name, r):
    S = core(name, r)
    largest, smallest = (x.item() for x in extreme_singular_values(S[None]))
    sigma = reference.singular_values(S.numpy())
    assert sigma[0] <= largest * (1 + 1e-12) <= sigma[0] * (1 + 5e-6)
    assert smallest <= sigma[-1] * (1 + 1e-12) + 1e-7  # what G = SᵀS rounds away
    if sigma[-1] > 1e-5 * sigma[0]:
        assert smallest >= sigma[-1] * (1 - 1e-4)


@pytest.mark.parametrize("center", cases.CENTERS)
@pytest.mark.parametrize("bound", BOUNDS)
def test_clip_equals_the_factorisation_within_its_tolerance(center, bound):
    """Distance to the exact clip, of the largest singular value: measured 4e-6 for rms and mean, 1.2e-3 for nearest."""
    names = [name for name in cases.CORES if condition_number(core(name, 12)) < 1e4]
    S = torch.stack([core(name, 12) for name in names])
    clipped, feasible, certified = clip_by_products(S, torch.full((len(S),), bound, dtype=torch.float64), center)
    expected = clamp_singular_values(S, bound - 1, center=center)
    assert certified.all()
    assert torch.equal(feasible, condition_number(S) <= bound * (1 + 1e-5))
    assert torch.equal(clipped[feasible], S[feasible])
    error = torch.linalg.matrix_norm(clipped - expected, 2) / singular_values(expected)[:, 0]
    assert error.max() < (5e-3 if center == "nearest" else 2e-5), dict(zip(names, error.tolist(), strict=True))
    assert (condition_number(clipped) <= bound * (1 + CERTIFICATE_TOLERANCE)).all()


@pytest.mark.parametrize("step", [1e-3, 1e-2, 0.1, 0.5])
@pytest.mark.parametrize("bound", [1.0, 1.1, 1.5, 4.0])
def test_nearest_is_hardly_farther_than_the_projection(bound, step):
    """As training meets it: a conditioned core and a step. Distance at most 1.1 times the least one; a no-op after."""
    S = torch.stack([near_the_bound(40, bound, step, seed) for seed in range(4)])
    bounds = torch.full((4,), bound, dtype=torch.float64)
    clipped, _, certified = clip_by_products(S, bounds, "nearest")
    expected = clamp_singular_values(S, bound - 1)
    assert certified.all()
    assert ((clipped - S).norm(dim=(1, 2)) <= 1.1 * (expected - S).norm(dim=(1, 2)) + 2e-5 * S.norm(dim=(1, 2))).all()
    _, feasible, _ = clip_by_products(clipped / clipped.abs().amax((1, 2), keepdim=True), bounds, "nearest")
    assert feasible.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", cases.CORES)
def test_every_core_ends_within_its_bound(name, dtype):
    """Followed or not: the guarantee is hard. Cores of κ > 1e6/√r are not followed: `start` is taken in their place."""
    S = torch.from_numpy(np.ascontiguousarray(cases.CORES[name](12))).to(dtype)
    start = torch.from_numpy(cases.with_singular_values(np.linspace(1, 1.2, 12), 5)).to(dtype)
    clipped, followed = clip_core_by_products(S[None], torch.tensor([1.1], dtype=torch.float64), "nearest", start[None])
    assert condition_number(clipped).item() <= 1.1 * (1 + CERTIFICATE_TOLERANCE + 1e-6)
    assert followed.item() == (condition_number(S).item() < 3e5)
    if followed:
        expected = clamp_singular_values(S, 0.1)
        assert torch.linalg.matrix_norm(clipped[0] / S.abs().max() - expected / S.abs().max(), 2) < 0.05
    else:
        assert torch.linalg.matrix_norm(clipped[0] - clamp_singular_values(start, 0.1), 2) < 5e-3


def test_what_has_no_certificate_is_replaced(monkeypatch):
    """With sign(H − aI) = I and sign(H − βaI) = −I everywhere nothing is clipped; the certificate sees it."""
    signs = torch.stack((torch.eye(12), -torch.eye(12)))[:, None].double()
    monkeypatch.setattr("hf_condlr.linalg.newton_schulz._sign", lambda X, *_: signs.expand_as(X))
    S, start = near_the_bound(12, 1.5, 0.5)[None], torch.eye(12, dtype=torch.float64)[None]
    bound = torch.tensor([1.1], dtype=torch.float64)
    assert not clip_by_products(S, bound, "nearest")[2].item()
    clipped, followed = clip_core_by_products(S, bound, "nearest", start)
    assert torch.equal(clipped, start) and not followed.item()


@pytest.mark.parametrize("end", [0.5, 1e-2, 1.0])
def test_sign_of_a_shifted_core(end):
    """Against eigh, where eigenvalues keep away from `end` by a hundredth of the norm, which `smallest` makes tight."""
    rng = np.random.default_rng(2)
    spectrum = np.r_[0.4, 1, rng.uniform(0.4, 1, 28)]
    spectrum = spectrum[np.abs(spectrum - end) > 0.01]
    Q = np.linalg.qr(rng.standard_normal((len(spectrum), len(spectrum)))).Q
    X = torch.from_numpy((Q * (spectrum - end)) @ Q.T)
    ends, smallest = (torch.tensor([x], dtype=torch.float64) for x in (end, 0.4))
    sign = _sign(X[None], ends, smallest, 1e-3, 1e-7)[0]
    assert np.abs(sign.numpy() - (Q * np.sign(spectrum - end)) @ Q.T).max() < 1e-6


@pytest.mark.parametrize("smallest", [1e-5, 1e-2, 0.9])
def test_newton_schulz_is_the_polar_factor(smallest):
    X = cases.with_singular_values(np.linspace(smallest, 1, 30), 3)
    polar = newton_schulz(torch.from_numpy(X), torch.tensor(smallest, dtype=torch.float64), 18)
    assert np.abs(polar.numpy() - reference.polar(X)).max() < 1e-9


def test_stacks_equal_their_members():
    S = torch.stack([near_the_bound(10, 1.1, step, seed) for seed, step in enumerate((1e-3, 0.3, 0.0))]).float()
    bounds = torch.tensor([1.1, 1.3, 1.1], dtype=torch.float64)
    stacked, _ = clip_core_by_products(S, bounds, "nearest", S)
    for i in range(3):
        alone, _ = clip_core_by_products(S[i : i + 1], bounds[i : i + 1], "nearest", S[i : i + 1])
        torch.testing.assert_close(stacked[i], alone[0])


def test_a_flat_spectrum_far_outside_is_clipped_to_the_largest_bound():
    """The worst start of a warm-up: 63 equal singular values and one 10⁵ times smaller, bound 10⁴."""
    S = torch.from_numpy(cases.with_singular_values(np.r_[np.ones(63), 1e-5], 3))[None]
    bound = torch.tensor([LARGEST_BOUND], dtype=torch.float64)
    clipped, followed = clip_core_by_products(S.float(), bound, "nearest", S.float())
    assert followed.item()
    assert condition_number(clipped).item() <= LARGEST_BOUND * (1 + 1e-4)
    assert (clipped - S).norm() < 1e-3
