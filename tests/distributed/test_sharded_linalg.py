"""Linear algebra of factors by rows, here with all rows on one process or with the blocks of several in one place."""

import numpy as np
import pytest
import torch

from hf_condlr.distributed.sharded_linalg import joined_qr, orthonormalize, scaled_qr
from hf_condlr.linalg import retract_qr
from tests.linalg.checks import CLOSE, each_dtype, each_shape, tensor
from tests.linalg.reference import array, orthonormality_error


@each_shape
@each_dtype
def test_orthonormalize_keeps_the_weight(shape, dtype):
    m, n, r = shape
    rng = np.random.default_rng(0)
    U, S, V = (tensor(rng.standard_normal(size), dtype) for size in ((m, r), (r, r), (n, r)))
    for scale in (1, 1e10, 1e-10):
        Q_U, core, Q_V = orthonormalize(scale * U, S, scale * V)
        assert max(orthonormality_error(array(Q)) for Q in (Q_U, Q_V)) <= 1e-13
        W = array(scale * U) @ array(S) @ array(scale * V).T
        product = array(Q_U) @ array(core) @ array(Q_V).T
        assert np.abs(product - W).max() <= CLOSE[dtype] * np.abs(W).max()


@pytest.mark.parametrize("heights", [[7, 7, 6], [19, 1, 0], [4, 4, 4, 4, 4], [20]])
@pytest.mark.parametrize("rank", [6, 2])
def test_qr_of_rows_is_that_of_all_rows(heights, rank):
    """Also where some have fewer rows than columns, or none, or X is singular and Q not unique."""
    X = 1e20 * torch.randn(2, 20, rank, dtype=torch.float64) @ torch.randn(2, rank, 6, dtype=torch.float64)
    parts = [scaled_qr(part) for part in X.split(heights, dim=1)]
    counts = [Q.shape[-1] for Q, _, _ in parts]
    blocks, R, scale = joined_qr(torch.stack([p[1] for p in parts]), torch.stack([p[2] for p in parts]), counts)
    Q = torch.cat([part[0] @ block for part, block in zip(parts, blocks, strict=True)], dim=1)
    assert max(orthonormality_error(array(q)) for q in Q) <= 1e-13
    torch.testing.assert_close(scale * Q @ R, X)
    if rank == 6:
        torch.testing.assert_close(Q, retract_qr(X))
