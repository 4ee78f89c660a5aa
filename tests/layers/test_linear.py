"""`LowRankLinear` against dense layers whose weight is U S Vᵀ, multiplied out by NumPy."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from hf_condlr import LowRankLinear
from hf_condlr.layers import InferenceLayer
from tests.layers.cases import (
    LEADING,
    LINEAR_CASES,
    SHAPES,
    assert_close,
    assert_orthonormal,
    dense_linear,
    matrix_of,
    numpy_of,
    product,
    truncation,
    with_random_core,
)


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize(("m", "n"), SHAPES.values(), ids=SHAPES)
def test_full_rank_linear_is_the_dense_layer(m, n, kind, leading):
    dense = dense_linear(m, n, kind=kind)
    layer = LowRankLinear.from_dense(dense, min(m, n))
    x = torch.randn(*leading, n)
    y = layer(x)
    assert y.shape == (*leading, m)
    assert_close(y, dense(x))


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize(("m", "n", "r"), LINEAR_CASES)
def test_linear_is_the_nearest_matrix_of_its_rank(m, n, r, kind):
    dense = dense_linear(m, n, kind=kind)
    layer = LowRankLinear.from_dense(dense, r)
    W = truncation(matrix_of(dense), r)
    x = torch.randn(4, n)
    assert layer.r == r
    assert_orthonormal(layer)
    assert_close(layer.matrix(), W)
    assert_close(layer(x), numpy_of(x) @ W.T + numpy_of(dense.bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("m", "n", "r"), LINEAR_CASES)
def test_linear_multiplies_by_u_s_vt(m, n, r, bias):
    layer = with_random_core(LowRankLinear(n, m, r, bias))
    W = product(layer)
    b = numpy_of(layer.bias) if bias else 0
    x = torch.randn(2, 3, n)
    expected = numpy_of(x) @ W.T + b
    assert_close(layer(x), expected)
    assert_close(layer.matrix(), W)
    assert_close(layer.to_dense()(x), expected)
    assert_close(layer.to_dense().weight, W)
    for form in ("folded", "pivoted"):
        folded = layer.fold(form)
        assert_close(folded(x), expected)
        dense = folded.to_dense() if isinstance(folded, InferenceLayer) else folded  # of full rank
        assert_close(dense.weight, W)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_without_bias_stays_without(bias):
    layer = LowRankLinear.from_dense(dense_linear(4, 6, bias=bias), 2)
    assert (layer.bias is not None) is bias
    assert (layer.to_dense().bias is not None) is bias
    assert (layer.fold().up.bias is not None) is bias
    assert layer.fold().down.bias is None


def test_conv1d_comes_back_as_conv1d():
    dense = dense_linear(4, 6, kind=Conv1D)
    layer = with_random_core(LowRankLinear.from_dense(dense, 2))
    again = layer.to_dense()
    assert type(again) is Conv1D
    assert again.weight.shape == dense.weight.shape == (6, 4)
    assert_close(again.weight, product(layer).T)
    x = torch.randn(3, 6)
    assert_close(again(x), layer(x))


def test_gradients_of_linear_are_right():
    layer = with_random_core(LowRankLinear(5, 4, 3, dtype=torch.float64))
    names, values = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)

    def forward(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert names == ("U", "S", "V", "bias")
    assert gradcheck(forward, (x, *values))


# B rows below, at and above min(m, n) = 6, where S is joined with a basis first
ROWS = [(), (1,), (6,), (7,), (3, 4), (2, 3, 9), (0, 9)]


@pytest.mark.parametrize("leading", ROWS, ids=str)
@pytest.mark.parametrize(("m", "n"), [(9, 6), (6, 9), (6, 6)])
def test_values_and_gradients_are_those_of_the_matrix_for_every_number_of_rows(m, n, leading):
    """Against NumPy's W = U S Vᵀ, in float64 to 1e-12 (measured: 2e-14)."""
    layer = with_random_core(LowRankLinear(n, m, 4, dtype=torch.float64))
    x = torch.randn(*leading, n, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(*leading, m, dtype=torch.float64)
    y = layer(x)
    (y * weights).sum().backward()
    U, S, V, W = *(numpy_of(p) for p in (layer.U, layer.S, layer.V)), product(layer)
    X, D = numpy_of(x).reshape(-1, n), numpy_of(weights).reshape(-1, m)
    G = D.T @ X  # the loss's gradient with respect to W
    assert_close(y, (X @ W.T + numpy_of(layer.bias)).reshape(*leading, m), 1e-12)
    assert_close(x.grad, (D @ W).reshape(*leading, n), 1e-12)
    assert_close(layer.bias.grad, D.sum(0), 1e-12)
    for p, expected in ((layer.U, G @ V @ S.T), (layer.S, U.T @ G @ V), (layer.V, G.T @ U @ S)):
        assert_close(p.grad, expected, 1e-12)


def bytes_between_forward_and_backward(layer, x):
    """Of storages that autograd keeps, parameters and x aside."""
    given = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters())}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in given)


@pytest.mark.parametrize(("m", "n"), [(40, 30), (30, 40)])
def test_many_rows_keep_one_intermediate_and_few_rows_two(m, n):
    """4 bytes times B r and min(m, n) r, with a copy of Sᵀ where it goes into V; the three products keep 2 B r."""
    r = 10
    layer = LowRankLinear(n, m, r)
    many, few = (torch.randn(rows, n, requires_grad=True) for rows in (500, 20))
    assert bytes_between_forward_and_backward(layer, many) == 4 * (500 * r + 30 * r + (r * r if n < m else 0))
    assert bytes_between_forward_and_backward(layer, few) == 4 * (2 * 20 * r)


@pytest.mark.parametrize("r", [2, 3, 4, 7, 8])
@pytest.mark.parametrize(("m", "n"), [(8, 8), (32, 16), (16, 32)])
def test_outputs_do_not_depend_on_where_the_factors_lie(m, n, r):
    """A loaded checkpoint's lie anywhere in a file: its outputs are those of the saved model to the bit."""
    layer = with_random_core(LowRankLinear(n, m, r))
    other = copy.deepcopy(layer)
    for p, offset in ((other.U, 1), (other.S, 2), (other.V, 3)):
        p.data = torch.empty(p.numel() + offset)[offset:].view(p.shape).copy_(p.data)
    for rows in (4, 40, 400):
        x = torch.randn(rows, n)
        assert torch.equal(layer(x), other(x))


def test_many_rows_under_autocast():
    layer = with_random_core(LowRankLinear(12, 10, 6))
    x = torch.randn(100, 12)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).abs().max() < 0.03 * expected.abs().max()
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


def test_compiled_for_dynamic_shapes_there_are_two_graphs_at_most():
    """One for few rows and one for many, whatever the sizes."""
    layer = with_random_core(LowRankLinear(9, 6, 4))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for rows in (3, 4, 6, 7, 30, 31, 3, 50, 2):
        x = torch.randn(rows, 9)
        assert_close(compiled(x), layer(x))
    assert 1 <= len(graphs) <= 2  # torch 2.11 needs one


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_exported_for_dynamic_shapes_one_graph_serves_every_number_of_rows(strict):
    layer = with_random_core(LowRankLinear(9, 6, 4))
    rows = torch.export.Dim("rows", min=1, max=1000)
    program = torch.export.export(layer, (torch.randn(8, 9),), dynamic_shapes={"x": {0: rows}}, strict=strict)
    traced = torch.jit.trace(layer, torch.randn(8, 9), check_trace=False)
    for count in (2, 6, 7, 500):
        x = torch.randn(count, 9)
        assert_close(program.module()(x), layer(x))
        assert_close(traced(x), layer(x))
    assert torch.fx.symbolic_trace(layer)(x).shape == (500, 6)
