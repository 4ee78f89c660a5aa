"""`LowRankLinear` and `LowRankConv2d` against dense layers whose weight is U S Vᵀ, multiplied out by NumPy."""

import copy
import io
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from hf_condlr import LowRankConv2d, LowRankLinear
from hf_condlr.errors import CondLRError, ConversionError
from hf_condlr.layers import FoldedLayer

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


# ----------------------------------------------------------------------------------------------------------- linear


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
    assert_close(layer.fold()(x), expected)


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
    assert len(graphs) == 2


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.* is deprecated:DeprecationWarning")
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


# -------------------------------------------------------------------------------------------------------------- conv

KERNELS = [1, 3, (2, 3), (4, 2), (1, 5)]
NUMERIC_PADDINGS = [0, 1, (0, 1)]
STEPS = list(itertools.product([1, 2, (2, 1)], [1, 2, (1, 2)]))  # stride, dilation
EVEN_SAME = "ignore:Using padding='same' with even kernel:UserWarning"  # of torch, for the dense layer as well


@pytest.mark.filterwarnings(EVEN_SAME)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("padding", [*NUMERIC_PADDINGS, "same", "valid"], ids=str)
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_conv_is_the_dense_convolution_in_every_geometry(mode, padding, kernel):
    x = torch.randn(2, 3, 11, 12)
    for stride, dilation in STEPS:
        if padding == "same" and stride != 1:
            continue  # refused by torch
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode}
        dense = nn.Conv2d(3, 4, kernel, **geometry)
        full = LowRankConv2d.from_dense(dense, min(dense.weight.shape[0], dense.weight[0].numel()))
        assert_close(full(x), dense(x))

        layer = with_random_core(LowRankConv2d(3, 4, kernel, 2, **geometry))
        with torch.no_grad():
            dense.weight.copy_(torch.from_numpy(product(layer)).reshape(dense.weight.shape))
            dense.bias.copy_(layer.bias)
        expected = dense(x)
        assert_close(layer(x), expected)
        assert_close(layer.to_dense()(x), expected)
        assert_close(layer.fold()(x), expected)


@pytest.mark.parametrize("r", [1, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_conv_is_the_nearest_kernel_matrix_of_its_rank(r, bias):
    dense = random_bias_(nn.Conv2d(3, 4, (2, 3), bias=bias))
    layer = LowRankConv2d.from_dense(dense, r)
    W = truncation(matrix_of(dense), r)
    assert layer.r == r
    assert (layer.bias is not None) is bias
    assert_orthonormal(layer)
    assert_close(layer.matrix(), W)
    assert_close(layer.to_dense().weight, W.reshape(4, 3, 2, 3))
    reference = copy.deepcopy(dense)
    with torch.no_grad():
        reference.weight.copy_(torch.from_numpy(W).reshape(4, 3, 2, 3))
    x = torch.randn(2, 3, 5, 6)
    assert_close(layer(x), reference(x))


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("leading", [(), (1,), (3,), (0,)], ids=str)
def test_conv_takes_images_without_a_batch_and_empty_batches(leading, mode):
    dense = nn.Conv2d(2, 5, 3, padding=1, padding_mode=mode)
    x = torch.randn(*leading, 2, 6, 7)
    y = LowRankConv2d.from_dense(dense, 5)(x)
    assert y.shape == (*leading, 5, 6, 7)
    assert_close(y, dense(x))


def test_conv_keeps_the_memory_format():
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    layer = LowRankConv2d(3, 4, 3, 2, padding=1)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last) and not y.is_contiguous()
    assert_close(y, layer(x.contiguous()))


def test_gradients_of_conv_are_right():
    layer = with_random_core(LowRankConv2d(2, 3, 2, 2, padding=1, padding_mode="replicate", dtype=torch.float64))
    names, values = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)

    def forward(x, *values):
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert names == ("U", "S", "V", "bias")
    assert gradcheck(forward, (x, *values))


def test_conv_refuses_a_geometry_that_torch_refuses():
    with pytest.raises(ValueError, match="padding='same' is not supported for strided"):
        LowRankConv2d(3, 4, 3, 2, stride=2, padding="same")


@pytest.mark.parametrize("groups", [2, 4])
def test_conv_refuses_groups(groups):
    with pytest.raises(ConversionError, match=rf"groups=1 .*; received groups={groups}\. "):
        LowRankConv2d.from_dense(nn.Conv2d(4, 4, 3, groups=groups), 1)


# -------------------------------------------------------------------------------------------------------- both layers

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


@pytest.mark.parametrize(("build", "shape"), DENSE_LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_kept(build, shape, dtype):
    dense = random_bias_(build()).to(dtype)
    x = torch.randn(2, *shape, dtype=dtype)
    layer = factor(dense, 5)
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.06, torch.float16: 6e-3}[dtype]
    for module in (layer, layer.to_dense(), layer.fold()):
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert module(x).dtype == dtype
        assert_close(module(x), dense(x), tolerance)


@pytest.mark.parametrize(("build", "shape"), DENSE_LAYERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_training_mode_and_requires_grad_are_kept(build, shape, training, requires_grad):
    dense = build().train(training).requires_grad_(requires_grad)
    layer = factor(dense, 2)
    for module in (layer, layer.to_dense(), layer.fold()):
        assert all(m.training is training for m in module.modules())
        assert {p.requires_grad for p in module.parameters()} == {requires_grad}


@pytest.mark.parametrize(("build", "shape"), DENSE_LAYERS)
def test_the_dense_layer_is_left_alone(build, shape):
    dense = build()
    before = copy.deepcopy(dense.state_dict())
    layer = factor(dense, 5)
    with torch.no_grad():
        for p in (layer.U, layer.S, layer.V):
            p.zero_()
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


@pytest.mark.parametrize(("build", "shape"), DENSE_LAYERS)
def test_the_bias_is_the_same_parameter(build, shape):
    dense = build()
    layer = factor(dense, 2)
    assert layer.bias is dense.bias
    assert layer.to_dense().bias is dense.bias


@pytest.mark.parametrize(("build", "shape"), DENSE_LAYERS)
def test_factors_are_contiguous_parameters(build, shape):
    layer = factor(build(), 2)
    for p in layer.parameters():
        assert isinstance(p, nn.Parameter)
        assert p.is_leaf
        assert p.is_contiguous()


@pytest.mark.parametrize(("build", "shape"), DENSE_LAYERS)
def test_factoring_a_second_time_changes_nothing(build, shape):
    layer = factor(build(), 2)
    again = factor(layer.to_dense(), 2)
    assert_close(again.matrix(), layer.matrix())


@pytest.mark.parametrize(("build", "shape"), DENSE_LAYERS)
def test_another_factorization_may_be_given(build, shape):
    seen = []

    def factorize(W, r):
        seen.append((tuple(W.shape), r))
        return torch.eye(W.shape[0])[:, :r], 2 * torch.eye(r), torch.eye(W.shape[1])[:, :r]

    layer = factor(build(), 2, factorize=factorize, tau=0.5, center="rms")
    m, n = layer.U.shape[0], layer.V.shape[0]
    assert seen == [((m, n), 2)]
    assert_close(layer.matrix(), 2 * torch.eye(m, n) * (torch.arange(n) < 2))
    assert (layer.tau, layer.center) == (0.5, "rms")


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_gradients_reach_every_parameter(build, shape):
    layer = build()
    layer(torch.randn(2, *shape)).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()} == {
        "U",
        "S",
        "V",
        "bias",
    }


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_autocast(build, shape):
    layer = build()
    x = torch.randn(4, *shape)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, expected, 0.03)
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_compile_without_graph_breaks(build, shape):
    """Through AOT autograd, forward and backward, but without generated code: that would need a C++ compiler."""
    layer = build()
    reference = copy.deepcopy(layer)
    x = torch.randn(2, *shape)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected, y = reference(x), compiled(x)
    assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for p, q in zip(layer.parameters(), reference.parameters(), strict=True):
        assert_close(p.grad, q.grad, 1e-4)


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_deepcopy_is_equal_and_independent(build, shape):
    layer = build(tau=0.3, center="mean")
    layer.bound = 7.0
    twin = copy.deepcopy(layer)
    x = torch.randn(2, *shape)
    assert torch.equal(twin(x), layer(x))
    assert (twin.tau, twin.center, twin.bound) == (0.3, "mean", 7.0)
    with torch.no_grad():
        twin.S.zero_()
    assert layer.S.any()


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_pickle(build, shape):
    layer = build(tau=math.inf)
    twin = pickle.loads(pickle.dumps(layer))
    x = torch.randn(2, *shape)
    assert torch.equal(twin(x), layer(x))
    assert (twin.tau, twin.bound) == (layer.tau, layer.bound)


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_state_dict_goes_through_a_safe_file(build, shape):
    layer, other = with_random_core(build()), build()
    assert list(layer.state_dict()) == ["U", "S", "V", "bias"]
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, *shape)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_the_bound_holds_for_the_core_that_was_loaded(build, shape):
    """A layer starts well conditioned; what a state dict brings need not be."""
    layer = build(tau=0.1)
    state = layer.state_dict()
    core = torch.eye(layer.r)
    core[0, 0] = 50
    layer.load_state_dict({**state, "S": core})
    assert layer.bound >= 50 * (1 - 1e-6)


@pytest.mark.parametrize(("build", "shape"), LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_counted_as_in_the_method(build, shape, bias):
    layer = build(bias=bias)
    m, n, r = layer.U.shape[0], layer.V.shape[0], layer.r
    b = m if bias else 0
    assert sum(p.numel() for p in layer.parameters()) == r * (m + n) + r * r + b
    assert sum(p.numel() for p in layer.fold().parameters()) == r * (m + n) + b
    assert sum(p.numel() for p in layer.to_dense().parameters()) == m * n + b


def test_literal_parameter_counts():
    assert sum(p.numel() for p in LowRankLinear(7, 5, 3).parameters()) == 3 * 12 + 9 + 5
    assert sum(p.numel() for p in LowRankConv2d(3, 5, (2, 3), 4).parameters()) == 4 * (5 + 18) + 16 + 5


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_fold_gives_ordinary_layers_only(build, shape):
    folded = build().fold()
    assert isinstance(folded, FoldedLayer)
    assert {type(m) for m in folded.children()} <= {nn.Linear, nn.Conv2d}
    assert [name for name, _ in folded.named_children()] == ["down", "up"]
    assert list(folded.state_dict()) == ["down.weight", "up.weight", "up.bias"]


# ------------------------------------------------------------------------------------------- what code asks a weight


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_answers_without_existing(name, fold, dtype):
    build, _, weight_shape = BUILDERS[name]
    layer = build(dtype=dtype).fold() if fold else build(dtype=dtype)
    weight = layer.weight
    assert (weight.dtype, weight.device, tuple(weight.shape)) == (dtype, torch.device("cpu"), weight_shape)
    with torch._C.DisableTorchFunctionSubclass():
        assert weight.untyped_storage().nbytes() == dtype.itemsize
    assert "weight" not in layer.state_dict()
    assert "weight" not in dict(layer.named_parameters())
    assert weight.requires_grad is False


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_weight_answers_on_another_device(name):
    build, _, weight_shape = BUILDERS[name]
    weight = build(device="meta").weight
    assert (weight.device.type, tuple(weight.shape)) == ("meta", weight_shape)


@pytest.mark.parametrize("fold", [False, True])
def test_computing_with_weight_is_an_error_that_says_what_to_do(fold):
    layer = LowRankLinear(7, 5, 3)
    weight = (layer.fold() if fold else layer).weight
    x = torch.randn(2, 7)
    for compute in (lambda: nn.functional.linear(x, weight), lambda: x @ weight, lambda: weight.norm()):
        with pytest.raises(ConversionError, match=r"exists only as U, S and V; .*Put the layer in exclude_modules"):
            compute()


# ------------------------------------------------------------------------------------------------------ construction


@pytest.mark.parametrize("r", [0, -1, 6, 100])
def test_rank_out_of_range(r):
    rule = rf"rank of a 5×7 weight lies in 1 … 5; received r={r}\. "
    with pytest.raises(ConversionError, match=rule):
        LowRankLinear(7, 5, r)
    with pytest.raises(ConversionError, match=rule):
        LowRankLinear.from_dense(nn.Linear(7, 5), r)


def test_rank_out_of_range_of_a_kernel_matrix():
    with pytest.raises(ConversionError, match=r"5×12 weight lies in 1 … 5; received r=6"):
        LowRankConv2d(3, 5, 2, 6)
    with pytest.raises(ConversionError, match=r"20×12 weight lies in 1 … 12; received r=13"):
        LowRankConv2d.from_dense(nn.Conv2d(3, 20, 2), 13)


@pytest.mark.parametrize("tau", [-0.5, math.nan])
@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_no_bound_below_one(build, shape, tau):
    with pytest.raises(CondLRError, match=f"tau must be .*; received {tau}"):
        build(tau=tau)


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_unknown_center(build, shape):
    with pytest.raises(CondLRError, match="center must be one of nearest, rms, mean; received 'median'"):
        build(center="median")


@pytest.mark.parametrize("m, n, r", [(60, 60, 60), (80, 40, 10), (40, 80, 10)])
def test_a_fresh_layer_is_as_large_as_torch_makes_it_and_perfectly_conditioned(m, n, r):
    layer, dense = LowRankLinear(n, m, r), nn.Linear(n, m)
    assert_orthonormal(layer)
    sigma = np.linalg.svd(numpy_of(layer.S), compute_uv=False)
    rms = np.linalg.norm(numpy_of(dense.weight)) / math.sqrt(min(m, n))
    assert sigma.max() / sigma.min() <= 1 + 1e-5
    assert abs(sigma.mean() / rms - 1) < 0.05
    assert 0.8 < layer.bias.abs().max().item() * math.sqrt(n) <= 1
    assert layer.bound == pytest.approx(1.1)


def test_a_fresh_convolution_is_as_large_as_torch_makes_it():
    layer, dense = LowRankConv2d(8, 40, 3, 20), nn.Conv2d(8, 40, 3)
    sigma = np.linalg.svd(numpy_of(layer.S), compute_uv=False)
    rms = np.linalg.norm(numpy_of(dense.weight)) / math.sqrt(40)
    assert sigma.max() / sigma.min() <= 1 + 1e-5
    assert abs(sigma.mean() / rms - 1) < 0.05


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_built_on_meta_and_filled_later(build, shape):
    layer = build(device="meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu").reset_parameters()
    assert_orthonormal(layer)
    assert layer(torch.randn(2, *shape)).isfinite().all()


@pytest.mark.parametrize(
    ("sigma", "tau", "bound"),
    [
        ([1.0, 1.0], 0.0, 1.0),
        ([1.1, 1.0], 0.2, 1.2),
        ([5.0, 1.0], 0.2, math.inf),
        ([5.0, 1.0], math.inf, math.inf),
        ([1.0, 0.0], 0.2, math.inf),
        ([0.0, 0.0], 0.2, math.inf),
        ([math.nan, 1.0], 0.2, math.inf),
    ],
)
def test_bound_at_the_start(sigma, tau, bound):
    layer = LowRankLinear(4, 3, 2, tau=tau)
    layer.set_factors(layer.U, torch.diag(torch.tensor(sigma)), layer.V)
    assert layer.bound == bound


@pytest.mark.parametrize(("build", "shape"), LAYERS)
@pytest.mark.parametrize("tau", [0.0, 0.1])
def test_an_orthogonal_core_obeys_every_bound(build, shape, tau):
    """Its κ differs from 1 by rounding alone, which is no reason to call it unconditioned."""
    for _ in range(5):
        assert build(tau=tau).bound == 1 + tau


def test_linear_shows_shape_rank_and_bound():
    layer = LowRankLinear(7, 5, 3, bias=False, tau=0.25)
    assert repr(layer) == "LowRankLinear(in_features=7, out_features=5, r=3, bias=False, tau=0.25, bound=1.25)"
    layer.bound = math.inf
    assert "bound=inf" in repr(layer)


def test_conv_shows_shape_rank_and_bound():
    shown = repr(LowRankConv2d(3, 5, (2, 3), 4, stride=2, padding="valid", dilation=(1, 2), padding_mode="reflect"))
    for part in (
        "LowRankConv2d(3, 5,",
        "kernel_size=(2, 3)",
        "stride=(2, 2)",
        "padding='valid'",
        "dilation=(1, 2)",
        "padding_mode=reflect",
        "r=4",
        "bias=True",
        "tau=0.1",
        "bound=1.1",
    ):
        assert part in shown
