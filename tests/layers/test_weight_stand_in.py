"""What a factored layer returns as its `.weight`."""

import pytest
import torch
from torch import nn

from hf_condlr import LowRankLinear
from hf_condlr.errors import ConversionError
from tests.layers.cases import BUILDERS


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
