"""Back from factored layers: dense or folded, with the same outputs."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_condlr import LowRankLinear, fold_model, is_factored, to_dense_model
from hf_condlr.errors import ConversionError
from hf_condlr.layers import FoldedLayer, PivotedLayer
from tests.conversion.conversions import EVERY_CONV, LINEAR_MODELS, assert_same, convert, factored, lossless
from tests.models import (
    MODELS,
    bert,
    convnext,
    gpt2,
    logits,
    pixels,
    resnet,
    t5,
)
from tests.models import tokens as token_inputs


def pivot_model(model):
    return fold_model(model, "pivoted")


WAYS_BACK = {to_dense_model: (nn.Linear, Conv1D), fold_model: FoldedLayer, pivot_model: PivotedLayer}


@pytest.mark.parametrize("case", LINEAR_MODELS)
@pytest.mark.parametrize("back", WAYS_BACK)
def test_the_ways_back_keep_the_outputs(case, back):
    model, inputs = convert(case.build(), rank_ratio=0.25), case.inputs()
    with torch.no_grad():
        for layer in factored(model).values():  # an S that is not diagonal
            layer.S += 0.3 * torch.randn_like(layer.S)
    before, names = logits(model, inputs), list(factored(model))
    assert back(model) is model
    assert factored(model) == {}
    assert_same(logits(model, inputs), before)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, WAYS_BACK[back])
    assert not hasattr(model, "condlr")


def test_the_dense_model_is_of_the_same_classes_and_parameters_as_before():
    for build in (bert, gpt2, convnext):
        model = build()
        modules = {name: type(m) for name, m in model.named_modules()}
        shapes = {name: p.shape for name, p in model.state_dict().items()}
        targets = {"target_modules": EVERY_CONV} if build is convnext else {}
        to_dense_model(lossless(model, **targets))
        assert {name: type(m) for name, m in model.named_modules()} == modules
        assert {name: p.shape for name, p in model.state_dict().items()} == shapes


def test_the_dense_model_has_the_weights_of_before():
    model = gpt2()
    before = copy.deepcopy(model.state_dict())
    for name, value in to_dense_model(lossless(model)).state_dict().items():
        assert_same(value, before[name])


@pytest.mark.parametrize("back", WAYS_BACK)
def test_the_ways_back_of_convolutions(back):
    model = convert(resnet(), target_modules=EVERY_CONV)
    before = logits(model, pixels())
    assert len(factored(model)) == MODELS["resnet"].convolutions
    assert_same(logits(back(model), pixels()), before)


@pytest.mark.parametrize("back", WAYS_BACK)
def test_the_ways_back_keep_modes_and_dtype(back):
    model = convert(bert().to(torch.bfloat16).train()).requires_grad_(False)
    back(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.requires_grad for p in model.parameters()} == {False}
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize(("form", "saved"), [("folded", 0), ("pivoted", 4 * 4)])
def test_a_folded_model_has_as_many_weights_as_the_method_says(form, saved):
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10, bias=False))
    fold_model(convert(model, r=4), form)
    assert sum(p.numel() for p in model.parameters()) == 4 * 50 - saved + 30 + 4 * 40 - saved


def test_pivoted_a_layer_of_full_rank_is_dense():
    """mn weights are as few."""
    model = convert(bert(), rank_ratio=1.0)
    before = logits(model, token_inputs())
    size = sum(p.numel() for p in bert().parameters())
    pivot_model(model)
    assert not any(isinstance(m, PivotedLayer) for m in model.modules())
    assert sum(p.numel() for p in model.parameters()) == size
    assert "save_pretrained" not in vars(model)  # an ordinary checkpoint
    assert_same(logits(model, token_inputs()), before)


def test_an_unknown_form_is_refused():
    with pytest.raises(ConversionError, match="form must be one of folded, pivoted; received 'factored'"):
        fold_model(convert(bert()), "factored")


def test_a_dense_model_can_be_converted_again():
    model = to_dense_model(convert(bert(), r=3))
    before = logits(model, token_inputs())
    assert_same(logits(convert(model, r=3), token_inputs()), before)  # its weights have rank 3


@pytest.mark.parametrize("back", WAYS_BACK)
def test_a_layer_cannot_replace_itself(back):
    with pytest.raises(ConversionError, match="received LowRankLinear"):
        back(LowRankLinear(6, 6, 2))


@pytest.mark.parametrize("back", WAYS_BACK)
def test_the_ways_back_of_a_model_with_an_adapter(back):
    """A PeftModel forwards attributes such as the record to the model inside."""
    model = convert(bert(), exclude_modules=["query"])
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"]))
    before = logits(adapted, token_inputs())
    back(adapted)
    assert factored(adapted) == {} and not hasattr(adapted, "condlr") and not is_factored(adapted)
    assert_same(logits(adapted, token_inputs()), before)


def test_a_folded_t5_runs_under_dynamic_quantization():
    """Its feed-forward reads `wo.weight.dtype`, and a quantized layer's `weight` is a method."""
    model, inputs = fold_model(convert(t5(), rank_ratio=0.4)), MODELS["t5"].inputs()
    expected = logits(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch speaks of the successor of its quantization
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert (logits(quantized, inputs) - expected).abs().max() < 0.2 * expected.abs().max()
