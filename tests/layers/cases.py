"""Layers to test, and their weights multiplied out by NumPy."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_condlr import LowRankConv2d, LowRankLinear

SHAPES = {"tall": (9, 5), "wide": (5, 9), "square": (6, 6), "row": (1, 7), "column": (7, 1)}  # (m, n) = (out, in)
LINEAR_CASES = [
    pytest.param(m, n, r, id=f"{name}-r{r}")
    for name, (m, n) in SHAPES.items()
    for r in sorted({1, (min(m, n) + 1) // 2, min(m, n)})
]
LEADING = [(), (3,), (2, 3), (2, 1, 3, 2), (0,), (2, 0), (0, 4)]


def random_bias_(layer):
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def dense_linear(m, n, *, bias=True, kind=nn.Linear, dtype=torch.float32):
    return random_bias_(Conv1D(m, n) if kind is Conv1D else nn.Linear(n, m, bias)).to(dtype)


def with_random_core(layer):
    """A full, not symmetric S: after an SVD it is diagonal, and a transposed one would not be noticed."""
    with torch.no_grad():
        layer.S.copy_(torch.randn_like(layer.S))
    return random_bias_(layer)


def numpy_of(tensor):
    return tensor.detach().double().cpu().numpy()


def product(layer):  # (m, n)
    U, S, V = (numpy_of(p) for p in (layer.U, layer.S, layer.V))
    return U @ S @ V.T


def truncation(W, r):  # (m, n) -> (m, n)
    """The nearest matrix of rank r (Eckart–Young)."""
    P, sigma, Qh = np.linalg.svd(W, full_matrices=False)
    return (P[:, :r] * sigma[:r]) @ Qh[:r]


def matrix_of(dense):  # (m, n)
    W = numpy_of(dense.weight)
    return W.T if isinstance(dense, Conv1D) else W.reshape(W.shape[0], -1)


def assert_close(actual, expected, tolerance=1e-5):
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def assert_orthonormal(layer, tolerance=1e-5):
    for U in (numpy_of(layer.U), numpy_of(layer.V)):
        assert np.linalg.norm(U.T @ U - np.eye(layer.r)) <= tolerance * math.sqrt(layer.r)


BUILDERS = {
    "linear": (lambda **kw: LowRankLinear(7, 5, 3, **kw), (7,), (5, 7)),
    "conv": (lambda **kw: LowRankConv2d(3, 5, (2, 3), 3, padding=1, **kw), (3, 6, 6), (5, 3, 2, 3)),
    "padded conv": (lambda **kw: LowRankConv2d(3, 5, 3, 3, padding_mode="circular", padding=1, **kw), (3, 6, 6), None),
}
LAYERS = [pytest.param(build, shape, id=name) for name, (build, shape, _) in BUILDERS.items()]
DENSE = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "conv1d": (lambda: Conv1D(5, 7), (7,)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (2, 3), padding=1), (3, 6, 6)),
}
DENSE_LAYERS = [pytest.param(build, shape, id=name) for name, (build, shape) in DENSE.items()]


def factor(dense, r, **arguments):
    layer_class = LowRankConv2d if isinstance(dense, nn.Conv2d) else LowRankLinear
    return layer_class.from_dense(dense, r, **arguments)
