"""Layers of r rows of W and what the others are made of."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from hf_condlr import LowRankLinear, condition_report, fold_model, to_dense_model
from hf_condlr.layers import PivotedLayer
from tests.conversion.conversions import convert
from tests.layers.cases import LAYERS, numpy_of, product, with_random_core
from tests.models import bert, gpt2, logits
from tests.models import tokens as token_inputs


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_down_holds_rows_of_w_and_up_makes_the_others(build, shape):
    layer = with_random_core(build(dtype=torch.float64))
    W, pivoted = product(layer), layer.fold("pivoted")
    rows, C = numpy_of(pivoted.down.weight.flatten(1)), numpy_of(pivoted.up.weight.flatten(1))
    places = pivoted.order.tolist()
    for i, place in enumerate(places):
        expected = rows[place] if place < pivoted.r else C[place - pivoted.r] @ rows
        np.testing.assert_allclose(W[i], expected, rtol=0, atol=1e-12)
    assert np.abs(C).max() <= 2
    L, R = map(numpy_of, pivoted.values())
    np.testing.assert_allclose(L @ R, W, rtol=0, atol=1e-12)


def test_the_bias_is_the_very_parameter():
    layer = LowRankLinear(7, 5, 3)
    assert layer.fold("pivoted").bias is layer.bias
    assert LowRankLinear(7, 5, 3, bias=False).fold("pivoted").bias is None


def test_a_singular_core_is_pivoted_too():
    layer = LowRankLinear(9, 8, 4, dtype=torch.float64)
    with torch.no_grad():
        layer.S[:, 1] = layer.S[:, 0]
    x = torch.randn(3, 9, dtype=torch.float64)
    assert torch.allclose(layer.fold("pivoted")(x), layer(x), rtol=0, atol=1e-12)


def test_convolutions_take_a_single_image():
    build, shape = LAYERS[1].values
    layer = build()
    x = torch.randn(2, *shape)
    pivoted = layer.fold("pivoted")
    assert torch.allclose(pivoted(x[0]), pivoted(x)[0], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_its_rounding(dtype):
    """The bound on C keeps what it makes of rounding errors small: at most five times the folded layer's error."""
    torch.manual_seed(0)
    layer, x = LowRankLinear(96, 96, 40, tau=4.0), torch.randn(64, 96)
    errors = {}
    with torch.no_grad():
        expected = layer(x)
        for form in ("folded", "pivoted"):
            found = layer.fold(form).to(dtype)(x.to(dtype)).float()
            errors[form] = float((found - expected).norm() / expected.norm())
    assert errors["pivoted"] < 5 * errors["folded"] < 50 * torch.finfo(dtype).eps


def test_a_pivoted_model_is_copied_moved_compiled_and_exported():
    model = fold_model(convert(bert(), rank_ratio=0.4), "pivoted").eval()
    inputs = token_inputs()
    expected = logits(model, inputs)
    assert torch.equal(logits(copy.deepcopy(model), inputs), expected)
    half = copy.deepcopy(model).to(torch.bfloat16)
    orders = [m.order.dtype for m in half.modules() if isinstance(m, PivotedLayer)]
    assert orders and set(orders) == {torch.int32}
    exported = torch.export.export(model, (), dict(inputs))
    assert torch.allclose(exported.module()(**inputs).logits, expected, atol=1e-5)


def test_a_conv1d_becomes_dense_again_as_it_was():
    model = gpt2()
    kinds = {name: type(m) for name, m in model.named_modules() if not list(m.children())}
    fold_model(convert(model, rank_ratio=0.5), "pivoted")
    assert condition_report(model).max_orthonormality_error == 0
    to_dense_model(model)
    assert {name: type(m) for name, m in model.named_modules() if not list(m.children())} == kinds


def test_a_layer_inside_another_module_of_ones_own():
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    x = torch.randn(4, 20)
    expected = convert(model, r=5)(x)
    assert torch.allclose(fold_model(model, "pivoted")(x), expected, atol=1e-5)
