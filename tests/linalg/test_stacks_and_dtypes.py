"""What all functions of `hf_condlr.linalg` share: stacks, memory layouts, dtypes."""

from functools import partial

import numpy as np
import pytest
import torch

from hf_condlr import linalg
from tests.linalg import cases, reference
from tests.linalg.checks import RETRACTIONS, cholesky_or_qr, each_half, each_shape, tensor


def test_stacks_equal_their_members():
    rng = np.random.default_rng(0)
    U = tensor(np.stack([[cases.orthonormal(11, 4, 3 * i + j) for j in range(3)] for i in range(2)]))
    X = tensor(rng.standard_normal((2, 3, 11, 4)))
    S = tensor(rng.standard_normal((2, 3, 4, 4)))
    S[0, 0] = 0.5 * torch.eye(4)  # feasible among those that are not
    X[1, 2, :, 1] = X[1, 2, :, 0]  # singular among those that are not, in Cholesky-QR
    regular = [(i, j) for i in range(2) for j in range(3) if (i, j) != (1, 2)]
    functions = [
        (linalg.project_horizontal, (U, X)),
        (linalg.project_tangent, (U, X)),
        (linalg.orthonormality_error, (X,)),
        (linalg.retract_qr, (X,)),
        (cholesky_or_qr, (X,)),
        (linalg.retract_polar, (X,)),
        (linalg.singular_values, (S,)),
        (linalg.condition_number, (S,)),
        (linalg.is_conditionable, (S,)),
        *((partial(linalg.clamp_singular_values, tau=0.5, center=center), (S,)) for center in cases.CENTERS),
        (linalg.robust_svd, (X,)),
    ]
    for function, arguments in functions:
        before = [argument.clone() for argument in arguments]
        stacked = function(*arguments)
        transposed = function(*(argument.mT.contiguous().mT for argument in arguments))  # another memory layout
        for argument, copy in zip(arguments, before, strict=True):
            assert torch.equal(argument, copy), f"{function} changed its input"
        for i, j in regular:
            alone = function(*(argument[i, j] for argument in arguments))
            parts = (x if isinstance(x, tuple) else (x,) for x in (stacked, alone, transposed))
            for one, other, third in zip(*parts, strict=True):
                torch.testing.assert_close(one[i, j], other, rtol=1e-11, atol=1e-12)
                torch.testing.assert_close(third[i, j], other, rtol=1e-11, atol=1e-12)


def test_empty_stacks_stay_empty():
    X, S = torch.zeros(0, 6, 3), torch.zeros(0, 3, 3)
    for retract in RETRACTIONS.values():
        assert retract(X).shape == X.shape
    assert linalg.clamp_singular_values(S, 0.1).shape == S.shape
    assert linalg.condition_number(S).shape == (0,)


@each_half
@each_shape
def test_half_precision_is_computed_in_float32_and_given_back(dtype, shape):
    m, n, r = shape
    rng = np.random.default_rng(0)
    U = tensor(cases.orthonormal(m, r), dtype)
    G = tensor(rng.standard_normal((m, r)), dtype)
    S, W = tensor(rng.standard_normal((r, r)), dtype), tensor(rng.standard_normal((m, n)), dtype)
    exact = reference.array(G)
    expected = {
        linalg.retract_qr: reference.qr(exact),
        cholesky_or_qr: reference.qr(exact),
        linalg.retract_polar: reference.polar(exact),
        partial(linalg.project_horizontal, U): reference.project_horizontal(reference.array(U), exact),
        partial(linalg.project_tangent, U): reference.project_tangent(reference.array(U), exact),
    }
    for function, value in expected.items():
        result = function(G)
        assert result.dtype == dtype
        rounding = torch.finfo(dtype).eps / 2 * np.abs(value) + 1e-5 * np.abs(value).max()
        assert (np.abs(reference.array(result) - value) <= rounding).all()
    for factor in linalg.truncated_svd(W, r):
        assert factor.dtype == dtype
    assert linalg.singular_values(S).dtype == linalg.condition_number(S).dtype == torch.float64
    kappa = reference.condition_number(reference.array(S))
    assert linalg.condition_number(S).item() == pytest.approx(kappa, rel=1e-10)
