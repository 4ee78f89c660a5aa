"""`LowRankConv2d` against dense convolutions whose kernel is U S Vᵀ, multiplied out by NumPy."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.func import functional_call

from hf_condlr import LowRankConv2d
from hf_condlr.errors import ConversionError
from tests.layers.cases import (
    assert_close,
    assert_orthonormal,
    matrix_of,
    product,
    random_bias_,
    truncation,
    with_random_core,
)

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
        for form in ("folded", "pivoted"):
            assert_close(layer.fold(form)(x), expected)
            assert_close(layer.fold(form).to_dense()(x), expected)


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
