"""Which layers a config means, and which cannot be converted."""

import re

import pytest
import torch
import transformers
from accelerate import dispatch_model
from torch import nn
from torch.nn.utils import parametrizations

from hf_condlr import LowRankConv2d, LowRankLinear
from hf_condlr.errors import ConversionError
from tests.conversion.conversions import (
    ATTENTION,
    BODY,
    MLP,
    QUERY_VALUE,
    assert_same,
    assert_unchanged,
    convert,
    factored,
    in_layers,
    lossless,
    snapshot,
)
from tests.models import (
    bert,
    convnext,
    gpt2,
    logits,
    pixels,
    resnet,
    siglip,
)
from tests.models import tokens as token_inputs

TARGETS = {
    "all-linear": ({}, BODY),
    "suffixes": ({"target_modules": ["query", "value"]}, in_layers(QUERY_VALUE)),
    "longer suffix": (
        {"target_modules": ["self.query", "pooler.dense"]},
        in_layers(QUERY_VALUE[:1]) | {"bert.pooler.dense"},
    ),
    "suffix is whole words": ({"target_modules": ["ery", "pooler.dense"]}, {"bert.pooler.dense"}),
    "whole name": ({"target_modules": ["bert.pooler.dense"]}, {"bert.pooler.dense"}),
    "regex": ({"target_modules": r".*\.1\..*\.(query|value)"}, in_layers(QUERY_VALUE, [1])),
    "regex is a full match": ({"target_modules": r"bert\.pooler|.*layer\.0\..*query"}, in_layers(QUERY_VALUE[:1], [0])),
    "regex over containers": ({"target_modules": r"bert\.encoder\..*"}, in_layers(ATTENTION + MLP)),
    "named head": ({"target_modules": ["classifier", "pooler.dense"]}, {"classifier", "bert.pooler.dense"}),
    "excluded suffix": ({"exclude_modules": ["dense"]}, in_layers(ATTENTION[:3])),
    "excluded regex": (
        {"exclude_modules": r".*\.layer\.0\..*"},
        in_layers(ATTENTION + MLP, [1]) | {"bert.pooler.dense"},
    ),
    "excluded of named": (
        {"target_modules": ["query", "value"], "exclude_modules": ["bert.encoder.layer.0.attention.self.query"]},
        in_layers(QUERY_VALUE) - {"bert.encoder.layer.0.attention.self.query"},
    ),
    "saved": ({"modules_to_save": ["pooler"]}, in_layers(ATTENTION + MLP)),
    "one layer": ({"target_modules": ["query", "value"], "layers_to_transform": 1}, in_layers(QUERY_VALUE, [1])),
    "some layers": ({"target_modules": ["query"], "layers_to_transform": [0, 1]}, in_layers(QUERY_VALUE[:1])),
    "layers of a list": (
        {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
        in_layers(QUERY_VALUE[:1], [1]),
    ),
    "layers of several lists": (
        {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": ["h", "layer"]},
        in_layers(QUERY_VALUE[:1], [1]),
    ),
}


@pytest.mark.parametrize(("config", "names"), TARGETS.values(), ids=TARGETS)
def test_targets_follow_the_rules_of_peft(config, names):
    model = bert()
    outputs = logits(model, token_inputs())
    lossless(model, **config)
    assert set(factored(model)) == names
    assert_same(logits(model, token_inputs()), outputs)


def test_conv1d_is_a_linear_layer():
    model = convert(gpt2(), target_modules=["c_attn"])
    assert set(factored(model)) == {"transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"}
    assert factored(model)["transformer.h.0.attn.c_attn"].weight_shape == (16, 48)  # as Conv1D stores it


def test_convolutions_are_converted_where_they_are_named():
    model, before = convnext(), logits(convnext(), pixels())
    lossless(model, target_modules=["patch_embeddings", "downsampling_layer.1"])
    assert {name: type(m) for name, m in factored(model).items()} == {
        "convnext.embeddings.patch_embeddings": LowRankConv2d,
        "convnext.encoder.stages.1.downsampling_layer.1": LowRankConv2d,
    }
    assert_same(logits(model, pixels()), before)


def test_all_linear_leaves_convolutions_alone():
    model = convert(convnext())
    assert {type(m) for m in factored(model).values()} == {LowRankLinear}
    assert not any("conv" in name or "patch" in name for name in model.condlr.report.skipped)


def test_a_model_of_plain_torch():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 3))
    before = model(torch.ones(2, 1, 4, 4))
    lossless(model, target_modules=["0", "3", "4"])
    assert [type(m) for m in model] == [LowRankConv2d, nn.ReLU, nn.Flatten, LowRankLinear, LowRankLinear]
    assert_same(model(torch.ones(2, 1, 4, 4)), before)


NO_MATCH = {
    "no such name": (bert, {"target_modules": ["q_proj"]}),
    "no such regex": (bert, {"target_modules": r"encoder\.query"}),
    "no such layer": (bert, {"target_modules": ["query"], "layers_to_transform": [7]}),
    "a container only": (bert, {"target_modules": ["attention"]}),
    "everything excluded": (bert, {"exclude_modules": r".*"}),
    "dropouts and norms only": (bert, {"target_modules": ["dropout", "LayerNorm"]}),
    "no linear layer": (lambda: nn.Sequential(nn.ReLU()), {}),
    "no linear layer but the head": (resnet, {}),
}


@pytest.mark.parametrize(("build", "config"), NO_MATCH.values(), ids=NO_MATCH)
def test_no_match_is_an_error(build, config):
    model = build()
    before = snapshot(model)
    with pytest.raises(ConversionError, match="must match at least one layer; received target_modules="):
        convert(model, **config)
    assert_unchanged(model, before)


def test_no_match_lists_the_names_that_exist():
    with pytest.raises(ConversionError, match=r"\['q_proj'\]") as caught:
        convert(bert(), target_modules=["q_proj"])
    for name in ("bert.encoder.layer.0.attention.self.query", "bert.pooler.dense", "classifier"):
        assert name in str(caught.value)
    assert "LayerNorm" not in str(caught.value)


def test_no_match_lists_not_too_many_names():
    model = nn.ModuleDict({f"layer_{i}": nn.Linear(2, 2) for i in range(100)})
    with pytest.raises(ConversionError, match="and 60 more") as caught:
        convert(model, target_modules=["q_proj"])
    assert len(str(caught.value)) < 1000


def test_no_match_after_everything_was_converted():
    model = convert(nn.Sequential(nn.Linear(6, 6)))
    with pytest.raises(ConversionError, match="must match at least one layer"):
        convert(model)


class ScaledLinear(nn.Linear):
    """Its own forward, as quantized and masked layers have."""

    def forward(self, x):
        return 2 * super().forward(x)


class PlainSubclass(nn.Linear):
    """Nothing of its own."""


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine, self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(self.fine(x)))


class TiedToEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine, self.embedding, self.first = nn.Linear(6, 6), nn.Embedding(9, 6), nn.Linear(6, 9)
        self.first.weight = self.embedding.weight


class Shared(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.fine, self.first = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(self.fine(x)))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.fine, self.attention = nn.Linear(6, 6), nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.attention(*[self.fine(x)] * 3)[0]


def chain(layer):
    return nn.Sequential(nn.Linear(6, 6), layer)


def quantized():
    layer = nn.Linear(6, 6)
    layer.weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)
    return chain(layer)


REFUSED = {  # builder, name, reason
    "tied linear": (Tied, "first", "tied"),
    "tied embedding": (TiedToEmbedding, "first", "tied"),
    "child of MultiheadAttention": (Attention, "attention.out_proj", "MultiheadAttention"),
    "its own forward": (lambda: chain(ScaledLinear(6, 6)), "1", "ScaledLinear"),
    "quantized": (quantized, "1", r"quantized \(torch\.int8\)"),
    "parametrized": (lambda: chain(parametrizations.weight_norm(nn.Linear(6, 6))), "1", "."),
}
NEVER_LINEAR = {
    "grouped convolution": (lambda: chain(nn.Conv2d(6, 6, 1, groups=3)), "1", "groups=3"),
    "embedding": (lambda: chain(nn.Embedding(6, 6)), "1", "Embedding"),
    "one-dimensional convolution": (lambda: chain(nn.Conv1d(6, 6, 1)), "1", "Conv1d"),
    "transposed convolution": (lambda: chain(nn.ConvTranspose2d(6, 6, 1)), "1", "ConvTranspose2d"),
    "bilinear": (lambda: chain(nn.Bilinear(6, 6, 6)), "1", "Bilinear"),
}


@pytest.mark.parametrize(("build", "name", "reason"), (REFUSED | NEVER_LINEAR).values(), ids=REFUSED | NEVER_LINEAR)
def test_what_cannot_be_factored_is_refused_when_named(build, name, reason):
    model = build()
    before = snapshot(model)
    with pytest.raises(ConversionError, match=rf"named layer must be convertible; received '{name}': .*{reason}"):
        convert(model, target_modules=[name, "0", "fine"])
    assert_unchanged(model, before)


@pytest.mark.parametrize(("build", "name", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_factored_is_skipped_and_reported_under_all_linear(build, name, reason):
    model = build()
    module = model.get_submodule(name)
    convert(model)
    assert model.get_submodule(name) is module
    assert list(factored(model)) == ["fine" if hasattr(model, "fine") else "0"]
    assert set(model.condlr.report.skipped) == ({"first", "second"} if build is Tied else {name})
    assert re.search(reason, model.condlr.report.skipped[name])
    assert name in str(model.condlr.report)


@pytest.mark.parametrize(("build", "name", "reason"), NEVER_LINEAR.values(), ids=NEVER_LINEAR)
def test_other_layers_are_not_what_all_linear_means(build, name, reason):
    model = convert(build())
    assert list(factored(model)) == ["0"]
    assert model.condlr.report.skipped == {}


def test_a_subclass_without_a_forward_of_its_own_is_converted():
    assert list(factored(convert(chain(PlainSubclass(6, 6))))) == ["0", "1"]


@pytest.mark.parametrize("build", [Tied, Shared, Attention])
def test_what_was_skipped_still_computes(build):
    model = build()
    x = torch.randn(2, 3, 6)
    before = model(x)
    assert_same(lossless(model)(x), before)


def test_pooling_by_multihead_attention_is_left_alone():
    model = siglip(transformers.SiglipVisionModel)
    with torch.no_grad():
        before = model(**pixels()).pooler_output
        lossless(model)
        assert_same(model(**pixels()).pooler_output, before)
    (skipped,) = model.condlr.report.skipped
    assert skipped.endswith("head.attention.out_proj")
    assert len(factored(model)) == 2 * 6 + 2


def test_a_transformer_of_torch_computes_the_same_on_its_fast_path():
    """In eval mode and without gradients nn.TransformerEncoderLayer hands its weights to one fused kernel."""
    block = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoder(block, 2, enable_nested_tensor=False)).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        before = model(x)
        assert_same(lossless(model)(x), before)
    assert "0" in factored(model)


def test_a_layer_under_two_names_stays_one_layer():
    model, x = Shared(), torch.randn(4, 6)
    before = model(x)
    lossless(model)
    assert model.first is model.second and set(factored(model)) == {"fine", "first"}
    assert_same(model(x), before)


def test_the_model_cannot_be_the_layer_itself():
    layer = nn.Linear(6, 6)
    with pytest.raises(ConversionError, match=r"LowRankLinear\.from_dense"):
        convert(layer, target_modules=r".*")
    with pytest.raises(ConversionError):
        convert(layer)
    assert type(layer) is nn.Linear


# ------------------------------------------------------------------------------------------------ what hides a weight


class PackedWeight(torch.Tensor):
    """As torchao's quantized tensors: most operations are not implemented."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("__get__", "dim", "detach", "__repr__", "requires_grad_"):
            return super().__torch_function__(func, types, args, kwargs)
        raise NotImplementedError(name)


def packed():
    layer = nn.Linear(6, 6)
    weight = layer.weight.detach().as_subclass(PackedWeight)
    del layer.weight
    layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return layer


def test_a_weight_of_a_class_of_its_own_is_skipped_or_refused_when_named():
    """torchao's and bitsandbytes' are, and those that FSDP shards."""
    model = chain(packed())
    convert(model)
    assert list(factored(model)) == ["0"]
    assert "its weight is a PackedWeight" in model.condlr.report.skipped["1"]
    with pytest.raises(ConversionError, match=r"received '1': its weight is a PackedWeight"):
        convert(chain(packed()), target_modules=["1"])


def test_layers_that_accelerate_moves_are_named_with_the_remedy():
    model = dispatch_model(chain(nn.Linear(6, 6)), {"": "cpu"}, force_hooks=True)
    with pytest.raises(ConversionError, match=r"matches only 0 \(accelerate moves .*load the model without device_map"):
        convert(model)


def test_where_nothing_can_be_converted_the_reasons_are_given():
    model = nn.Sequential(ScaledLinear(6, 6))
    with pytest.raises(ConversionError, match=r"matches only 0 \(a ScaledLinear with its own forward\)"):
        convert(model)


def test_a_second_conversion_says_that_the_model_is_factored():
    model = convert(bert())
    with pytest.raises(ConversionError, match="a model in which 13 layers are factored already"):
        convert(model)


def test_layers_quantized_by_torchao_are_skipped_or_refused():
    torchao = pytest.importorskip("torchao.quantization")
    model = bert()
    torchao.quantize_(model.bert.encoder, torchao.Int8WeightOnlyConfig())
    with pytest.raises(ConversionError, match=r"layer\.0\.attention\.self\.query': its weight is a Int8Tensor"):
        convert(model, target_modules=["query"])
    convert(model)
    assert set(factored(model)) == {"bert.pooler.dense"}
    assert len(model.condlr.report.skipped) == 12
