"""What a factored layer returns as its `.weight`."""

import pytest
import torch
from torch import nn

from hf_condlr import LowRankLinear
from hf_condlr.errors import ConversionError
from tests.layers.cases import BUILDERS, assert_close


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize("form", [None, "folded", "pivoted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_answers_without_existing(name, form, dtype):
    build, _, weight_shape = BUILDERS[name]
    layer = build(dtype=dtype).fold(form) if form else build(dtype=dtype)
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


@pytest.mark.parametrize("form", [None, "folded", "pivoted"])
def test_computing_with_weight_is_an_error_that_says_what_to_do(form):
    layer = LowRankLinear(7, 5, 3)
    weight = (layer.fold(form) if form else layer).weight
    x = torch.randn(2, 7)
    for compute in (lambda: nn.functional.linear(x, weight), lambda: x @ weight, lambda: weight.norm()):
        with pytest.raises(ConversionError, match=r"exists only as U, S and V; .*Put the layer in exclude_modules"):
            compute()


class ReadsFacts(nn.Module):
    """As T5 and others do, which cast to the dtype of a layer's weight."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.to(self.layer.weight.dtype).to(self.layer.weight.device))


class MultipliesByWeight(ReadsFacts):
    """As Mamba does with its `dt_proj`."""

    def forward(self, x):
        return torch.relu(x @ self.layer.weight.mT)


class ReducesWeight(ReadsFacts):
    """An operation that a compiler fuses into code of its own."""

    def forward(self, x):
        return x * self.layer.weight.sum(0)


@pytest.mark.parametrize("form", [None, "folded", "pivoted"])
@pytest.mark.parametrize("trace", ["eager", "aot_eager", "export"])
def test_traced_code_may_read_facts_and_computes_nothing_from_a_weight(form, trace):
    """Where it computes with a weight, the graph raises an error instead of returning NaN."""
    layer, x = LowRankLinear(7, 5, 3), torch.randn(2, 7)
    layer = layer.fold(form) if form else layer

    def traced(module):
        if trace == "export":
            return torch.export.export(module, (x,)).module()
        torch.compiler.reset()
        return torch.compile(module, backend=trace, fullgraph=True)

    with torch.no_grad():
        assert_close(traced(ReadsFacts(layer))(x), layer(x))
        for module in (MultipliesByWeight(layer), ReducesWeight(layer)):
            with pytest.raises(ConversionError, match="exists only as U, S and V"):
                traced(module)(x)
