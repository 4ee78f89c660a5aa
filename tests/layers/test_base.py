"""What `LowRankLinear` and `LowRankConv2d` share: construction, ways to and from dense layers, copies."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from hf_condlr import LowRankConv2d, LowRankLinear
from hf_condlr.errors import CondLRError, ConversionError
from hf_condlr.layers import FoldedLayer, PivotedLayer
from tests.layers.cases import (
    DENSE_LAYERS,
    LAYERS,
    assert_close,
    assert_orthonormal,
    factor,
    numpy_of,
    random_bias_,
    with_random_core,
)


@pytest.mark.parametrize(("build", "shape"), DENSE_LAYERS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_kept(build, shape, dtype):
    dense = random_bias_(build()).to(dtype)
    x = torch.randn(2, *shape, dtype=dtype)
    layer = factor(dense, 5)
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.06, torch.float16: 6e-3}[dtype]
    for module in (layer, layer.to_dense(), layer.fold(), layer.fold("pivoted")):
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert module(x).dtype == dtype
        assert_close(module(x), dense(x), tolerance)


@pytest.mark.parametrize(("build", "shape"), DENSE_LAYERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_training_mode_and_requires_grad_are_kept(build, shape, training, requires_grad):
    dense = build().train(training).requires_grad_(requires_grad)
    layer = factor(dense, 2)
    for module in (layer, layer.to_dense(), layer.fold(), layer.fold("pivoted")):
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
    assert sum(p.numel() for p in layer.fold("pivoted").parameters()) == r * (m + n - r) + b
    assert sum(p.numel() for p in layer.to_dense().parameters()) == m * n + b


def test_literal_parameter_counts():
    assert sum(p.numel() for p in LowRankLinear(7, 5, 3).parameters()) == 3 * 12 + 9 + 5
    assert sum(p.numel() for p in LowRankConv2d(3, 5, (2, 3), 4).parameters()) == 4 * (5 + 18) + 16 + 5


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_fold_gives_ordinary_layers_only(build, shape):
    for form, kind, own in (("folded", FoldedLayer, {"up.bias"}), ("pivoted", PivotedLayer, {"bias", "order"})):
        folded = build().fold(form)
        assert isinstance(folded, kind)
        assert {type(m) for m in folded.children()} <= {nn.Linear, nn.Conv2d}
        assert [name for name, _ in folded.named_children()] == ["down", "up"]
        assert set(folded.state_dict()) == {"down.weight", "up.weight"} | own


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
