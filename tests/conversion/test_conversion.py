"""Conversion in place and back: which layers, at which rank, and that the model stays what it was."""

import copy
import logging
import math
import pickle
import re

import pytest
import tokenizers
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from hf_condlr import CondLRConfig, LowRankConv2d, LowRankLinear, fold_model, get_robust_lowrank_model, to_dense_model
from hf_condlr.errors import ConfigError, ConversionError
from hf_condlr.layers import FoldedLayer
from tests.models import (
    LABELS,
    MODELS,
    VOCAB,
    bert,
    convnext,
    dense_layers,
    gpt2,
    llama,
    logits,
    pixels,
    resnet,
    siglip,
    t5,
)
from tests.models import tokens as token_inputs

LINEAR_MODELS = [pytest.param(case, id=name) for name, case in MODELS.items() if case.linear_layers]
ALL_MODELS = [pytest.param(case, id=name) for name, case in MODELS.items()]
EVERY_CONV = r".*(patch_embeddings\.projection|patch_embeddings|downsampling_layer\.1|convolution)"


def factored(model):
    """{name: layer} of the factored layers."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (LowRankLinear, LowRankConv2d))}


def convert(model, **config):
    if not {"r", "rank_ratio", "compression_ratio"} & set(config):
        config["rank_ratio"] = 0.5
    return get_robust_lowrank_model(model, CondLRConfig(**config))


def lossless(model, **config):
    """Every target at full rank and without a bound: the model computes what it did."""
    return convert(model, rank_ratio=1.0, tau="inf", **config)


def assert_same(actual, expected, tolerance=1e-5):
    """Up to `tolerance` of the largest number."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


def snapshot(model):
    modules = [(name, id(m), m.training) for name, m in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()]
    return modules, parameters, set(vars(model))


def assert_unchanged(model, before):
    modules, parameters, attributes = snapshot(model)
    assert modules == before[0]
    assert [p[:3] for p in parameters] == [p[:3] for p in before[1]]
    for (*_, now), (*_, then) in zip(parameters, before[1], strict=True):
        assert now.is_meta or torch.equal(now.nan_to_num(), then.nan_to_num())
    assert attributes == before[2]


# ------------------------------------------------------------------------------------------- the model stays the same


@pytest.mark.parametrize("case", LINEAR_MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_at_full_rank_and_without_a_bound_nothing_changes(case, dtype, tolerance):
    model = case.build().to(dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in case.inputs().items()}
    before, dense = logits(model, inputs), dense_layers(model)
    model_class = type(model)

    converted = lossless(model)

    assert converted is model
    assert type(model) is model_class
    layers = factored(model)
    assert len(layers) == case.linear_layers
    assert set(layers) == set(dense) - {case.head}
    assert all(layer.r == min(layer.weight_shape) for layer in layers.values())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert_same(logits(model, inputs), before, tolerance)


@pytest.mark.parametrize("case", ALL_MODELS)
def test_at_full_rank_with_all_convolutions_nothing_changes(case):
    model, inputs = case.build(), case.inputs()
    before = logits(model, inputs)
    grouped = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups != 1]
    lossless(model, target_modules=r".*", exclude_modules=refused_of(model))
    layers = factored(model).values()
    assert sum(isinstance(layer, LowRankConv2d) for layer in layers) == case.convolutions
    tied_head = case.build in (gpt2, t5)
    assert sum(isinstance(layer, LowRankLinear) for layer in layers) == case.linear_layers + (0 if tied_head else 1)
    assert [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)] == grouped
    assert_same(logits(model, inputs), before)


def refused_of(model):
    """Names of the layers with a weight matrix that cannot be factored: embeddings, grouped and tied ones."""
    grouped = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups != 1]
    embeddings = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    tied = [n for n, m in model.named_modules() if n not in embeddings and shares_weight(m, embeddings.values())]
    return [*embeddings, *grouped, *tied]


def shares_weight(module, weights):
    return any(weight is getattr(module, "weight", None) for weight in weights)


@pytest.mark.parametrize("case", LINEAR_MODELS)
def test_at_low_rank_the_outputs_change(case):
    """What makes the tests of equality worth something: these models notice an approximation."""
    model, inputs = case.build(), case.inputs()
    before = logits(model, inputs)
    assert (logits(convert(model, rank_ratio=0.25), inputs) - before).abs().max() > 0.1


@pytest.mark.parametrize("case", LINEAR_MODELS)
def test_gradients_reach_every_factor(case):
    model = convert(case.build())
    model(**case.inputs()).logits.square().sum().backward()
    for name, layer in factored(model).items():
        for p in (layer.U, layer.S, layer.V):
            assert p.grad is not None and p.grad.any(), name


def test_training_mode_is_kept_layer_by_layer():
    model = bert().train()
    model.bert.encoder.layer[1].eval()
    modes = {name: m.training for name, m in model.named_modules()}
    convert(model)
    assert {name: m.training for name, m in model.named_modules()} == modes


def test_requires_grad_is_kept_layer_by_layer():
    model = bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    convert(model)
    for name, p in model.named_parameters():
        assert p.requires_grad is (".layer.0." not in name), name


def test_other_parameters_and_biases_are_the_same_objects():
    model = bert()
    before = {name: p for name, p in model.named_parameters()}
    convert(model)
    after = {name: p for name, p in model.named_parameters()}
    common = set(before) & set(after)
    assert all(after[name] is before[name] for name in common)
    assert set(before) - set(after) == {f"{name}.weight" for name in factored(model)}
    assert set(after) - set(before) == {f"{name}.{p}" for name in factored(model) for p in "USV"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(dtype):
    model, inputs = bert().to(dtype), token_inputs()
    before = logits(model, inputs)
    lossless(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert_same(logits(model, inputs).float(), before.float(), 0.05)


def test_svd_draws_no_random_numbers():
    model = bert()
    state = torch.get_rng_state()
    convert(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_config_and_report_are_on_the_model_and_not_in_its_state():
    config = CondLRConfig(r=2)
    model = bert()
    model_config = model.config.to_dict()
    get_robust_lowrank_model(model, config)
    assert model.condlr_config is config
    assert set(model.condlr_conversion.converted) == set(factored(model))
    assert not any("condlr" in key for key in model.state_dict())
    assert model.config.to_dict() == model_config


def test_the_config_is_not_changed():
    config = CondLRConfig(r=2, rank_pattern={"query": 1}, modules_to_save=["classifier"])
    before = copy.deepcopy(config)
    get_robust_lowrank_model(bert(), config)
    assert config == before


def test_report_in_words():
    model = convert(gpt2(), r=2, head="low_rank")
    first, *rest = str(model.condlr_conversion).splitlines()
    # 2 × (16·48 + 16·16 + 2·16·64) weights; 2 × (2·64 + 2·32 + 2·2·80 + 4·4) in factors
    assert first.startswith("8 layers converted, 6,144 weights became 1,056")
    assert len(rest) == 1
    assert "lm_head" in rest[0] and "tied" in rest[0]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same_and_are_independent(duplicate):
    model = convert(bert(), tau=0.3)
    twin = duplicate(model)
    assert torch.equal(logits(twin, token_inputs()), logits(model, token_inputs()))
    assert twin.condlr_config == model.condlr_config
    before = logits(model, token_inputs())
    with torch.no_grad():
        twin.bert.pooler.dense.S.zero_()
    assert torch.equal(logits(model, token_inputs()), before)


def test_state_dict_fits_a_model_converted_alike():
    model, other = convert(bert(), r=3), convert(bert(), r=3, init_weights="orthogonal")
    assert not torch.allclose(logits(other, token_inputs()), logits(model, token_inputs()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, token_inputs()), logits(model, token_inputs()))


# -------------------------------------------------------------------------------------------------------------- targets


def in_layers(names, layers=(0, 1)):
    return {f"bert.encoder.layer.{i}.{name}" for i in layers for name in names}


ATTENTION = [f"attention.self.{name}" for name in ("query", "key", "value")] + ["attention.output.dense"]
MLP = ["intermediate.dense", "output.dense"]
BODY = in_layers(ATTENTION + MLP) | {"bert.pooler.dense"}
QUERY_VALUE = ["attention.self.query", "attention.self.value"]

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
    assert not any("conv" in name or "patch" in name for name in model.condlr_conversion.skipped)


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


# ------------------------------------------------------------------------------------------- layers that are no targets


class ScaledLinear(nn.Linear):
    """A forward of its own, as quantized and masked layers have."""

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
    "forward of its own": (lambda: chain(ScaledLinear(6, 6)), "1", "ScaledLinear"),
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
    assert set(model.condlr_conversion.skipped) == ({"first", "second"} if build is Tied else {name})
    assert re.search(reason, model.condlr_conversion.skipped[name])
    assert name in str(model.condlr_conversion)


@pytest.mark.parametrize(("build", "name", "reason"), NEVER_LINEAR.values(), ids=NEVER_LINEAR)
def test_other_layers_are_not_what_all_linear_means(build, name, reason):
    model = convert(build())
    assert list(factored(model)) == ["0"]
    assert model.condlr_conversion.skipped == {}


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
    (skipped,) = model.condlr_conversion.skipped
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


# ----------------------------------------------------------------------------------------------------------------- head

CLASSIFIERS = ["vit", "swin", "convnext", "bert", "distilbert"]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_stays_dense(name):
    model = MODELS[name].build()
    head = model.classifier
    convert(model)
    assert model.classifier is head
    assert "classifier" not in model.condlr_conversion.converted


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize(("head", "r"), [("full_rank", 5), ("low_rank", 2)])
def test_a_classifier_is_factored_at_the_rank_asked_for(name, head, r):
    case = MODELS[name]
    model = convert(case.build(), head=head, rank_ratio=0.4, tau=0.3)
    assert model.classifier.weight_shape[0] == LABELS
    assert (model.classifier.r, model.classifier.tau) == (r, 0.3)
    assert len(factored(model)) == case.linear_layers + 1
    others = [layer for name, layer in factored(model).items() if name != "classifier"]
    assert all(layer.r == max(1, round(0.4 * min(layer.weight_shape))) for layer in others)


@pytest.mark.parametrize(("head", "r"), [("full_rank", 16), ("low_rank", 8)])
def test_an_output_embedding_is_factored_at_the_rank_asked_for(head, r):
    model = convert(llama(), head=head)
    assert model.lm_head.weight_shape == (VOCAB, 16)
    assert model.lm_head.r == r
    assert len(factored(model)) == MODELS["llama"].linear_layers + 1


def test_an_output_embedding_stays_dense():
    model = llama()
    head = model.lm_head
    convert(model)
    assert model.lm_head is head


@pytest.mark.parametrize("build", [gpt2, t5])
def test_a_tied_output_embedding_is_skipped_as_any_layer_and_refused_by_itself(build):
    model = convert(build(), head="low_rank")
    assert list(model.condlr_conversion.skipped) == ["lm_head"]
    assert "tied" in model.condlr_conversion.skipped["lm_head"]
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with pytest.raises(ConversionError, match="received 'lm_head': its weight is tied"):
        convert(build(), head="full_rank")


HEADS = [
    (transformers.BertForTokenClassification, "classifier"),
    (transformers.BertForQuestionAnswering, "qa_outputs"),
    (transformers.BertForMultipleChoice, "classifier"),
    (transformers.BertForMaskedLM, "cls.predictions.decoder"),
    (transformers.BertForNextSentencePrediction, "cls.seq_relationship"),
]


@pytest.mark.parametrize(("model_class", "head"), HEADS, ids=lambda x: getattr(x, "__name__", x))
def test_the_head_is_found_from_the_model(model_class, head):
    overrides = {} if "Token" in model_class.__name__ else {"num_labels": 2}
    model = convert(bert(model_class, tie_word_embeddings=False, **overrides))
    assert type(model.get_submodule(head)) is nn.Linear
    assert head not in model.condlr_conversion.converted
    assert len(factored(model)) >= 12


@pytest.mark.parametrize("build", [gpt2, llama])
def test_the_score_of_a_sequence_classifier_is_a_head(build):
    model_class = {gpt2: transformers.GPT2ForSequenceClassification, llama: transformers.LlamaForSequenceClassification}
    model = convert(build(model_class[build]))
    assert type(model.score) is nn.Linear
    assert len(factored(model)) == (8 if build is gpt2 else 14)


def test_the_head_is_found_where_the_model_is_its_own_base_model():
    """SigLIP's prefix names no attribute of its classifier, so that `base_model` is the whole model."""
    model = siglip()
    before = logits(model, pixels())
    lossless(model)
    assert type(model.classifier) is nn.Linear
    assert_same(logits(model, pixels()), before)


def test_a_base_model_has_no_head():
    assert len(factored(convert(bert(transformers.BertModel)))) == 13


@pytest.mark.parametrize("head", ["full_rank", "low_rank"])
@pytest.mark.parametrize("option", ["exclude_modules", "modules_to_save"])
def test_a_head_that_is_excluded_stays_dense(head, option):
    model = convert(bert(), head=head, **{option: ["classifier"]})
    assert type(model.classifier) is nn.Linear


def test_a_head_is_conditioned_beside_a_few_named_layers():
    model = convert(bert(), head="full_rank", target_modules=["query"])
    assert set(factored(model)) == in_layers(QUERY_VALUE[:1]) | {"classifier"}


# --------------------------------------------------------------------------------------------------------------- ranks

QUERY = "bert.encoder.layer.0.attention.self.query"
LAST_QUERY = "bert.encoder.layer.1.attention.self.query"
RANKS = {  # all layers but the classifier have min(m, n) = 16
    "r": ({"r": 3}, {3}),
    "largest r": ({"r": 16}, {16}),
    "ratio": ({"rank_ratio": 0.25}, {4}),
    "rounded up": ({"rank_ratio": 0.29}, {5}),
    "rounded down": ({"rank_ratio": 0.27}, {4}),
    "at least 1": ({"rank_ratio": 0.001}, {1}),
    "full": ({"rank_ratio": 1.0}, {16}),
    "full as an integer": ({"rank_ratio": 1}, {16}),
}


@pytest.mark.parametrize(("config", "ranks"), RANKS.values(), ids=RANKS)
def test_ranks(config, ranks):
    model = convert(bert(), **config)
    assert {layer.r for layer in factored(model).values()} == ranks
    assert {layer.r for layer in model.condlr_conversion.converted.values()} == ranks


def test_a_ratio_counts_from_each_layers_own_full_rank():
    model = convert(nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 40), nn.Linear(40, 4)), rank_ratio=0.5)
    assert [layer.r for layer in model] == [5, 5, 2]


PATTERNS = {
    "integer is a rank": ({"query": 1}, 1, 1, 4),
    "float is a ratio": ({"query": 1.0}, 16, 16, 4),
    "whole name": ({QUERY: 2}, 2, 4, 4),
    "regex": ({r"layer\.1\..*\.query": 2}, 4, 2, 4),
    "first match wins": ({r".*\.1\..*": 7, "query": 2, ".*": 3}, 2, 7, 3),
    "all": ({".*": 0.5}, 8, 8, 8),
    "no partial word": ({"uery": 2}, 4, 4, 4),
}


@pytest.mark.parametrize(("pattern", "query", "last_query", "other"), PATTERNS.values(), ids=PATTERNS)
def test_rank_patterns(pattern, query, last_query, other):
    layers = factored(convert(bert(), rank_ratio=0.25, rank_pattern=pattern))
    ranks = [layers[name].r for name in (QUERY, LAST_QUERY, "bert.encoder.layer.0.attention.self.key")]
    assert ranks == [query, last_query, other]


def test_a_rank_pattern_is_stronger_than_the_head_option():
    assert convert(bert(), head="full_rank", rank_pattern={"classifier": 3}).classifier.r == 3


@pytest.mark.parametrize(
    "config", [{"r": 17}, {"r": 2, "rank_pattern": {"query": 17}}, {"r": 6, "head": "low_rank"}], ids=str
)
def test_a_rank_that_no_layer_has_is_an_error_that_names_it(config):
    model = bert()
    before = snapshot(model)
    name, full = ("classifier", LABELS) if config.get("head") else (QUERY, 16)
    with pytest.raises(ConfigError, match=rf"rank of '{name}' is at most min\(in, out\) = {full}; received r="):
        convert(model, **config)
    assert_unchanged(model, before)


def test_one_warning_lists_the_layers_that_do_not_get_smaller(caplog):
    """32×8 has 256 weights, its factors 7·40 + 49 = 329 and 6·40 + 36 = 276; 100×100 breaks even above r = 41."""
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 100), nn.Linear(100, 100))
    with caplog.at_level(logging.WARNING, logger="hf_condlr"):
        convert(model, r=4, rank_pattern={"0": 7, "1": 6, "3": 41})
    (record,) = caplog.records
    message = record.getMessage()
    assert message == "factors are not smaller than the weight they replace in: 0, 1"


def test_no_warning_where_all_layers_get_smaller(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_condlr"):
        convert(nn.Sequential(nn.Linear(30, 40)), r=4)
    assert caplog.records == []


# ------------------------------------------------------------------------------------------------------ tau and starts


def test_tau_and_center_reach_the_layers():
    model = convert(bert(), tau=0.7, center="rms")
    assert {(layer.tau, layer.center) for layer in factored(model).values()} == {(0.7, "rms")}


def test_tau_patterns_take_the_first_match():
    pattern = {r".*\.1\..*\.query": "inf", "query": 0.5, QUERY: 9, "value": 0}
    layers = factored(convert(bert(), tau=0.1, tau_pattern=pattern))
    assert layers[LAST_QUERY].tau == math.inf
    assert layers[QUERY].tau == 0.5
    assert layers["bert.encoder.layer.1.attention.self.value"].tau == 0
    assert layers["bert.encoder.layer.1.attention.self.key"].tau == 0.1


def test_conversion_does_not_clip_what_was_learnt():
    """κ_0 is above 1 + τ; the first step conditions, or the warm-up in many."""
    model = bert()
    W = model.bert.pooler.dense.weight.detach().clone()
    convert(model, rank_ratio=1.0, tau=0.1)
    assert_same(model.bert.pooler.dense.matrix(), W)
    assert model.bert.pooler.dense.bound == math.inf


@pytest.mark.parametrize("init_weights", ["svd", "randomized_svd", "orthogonal"])
def test_every_start_gives_a_working_model(init_weights):
    model = convert(bert(), init_weights=init_weights, tau=0.1)
    assert logits(model, token_inputs()).isfinite().all()
    kappa_is_one = all(layer.bound == pytest.approx(1.1) for layer in factored(model).values())
    assert kappa_is_one is (init_weights == "orthogonal")


# ------------------------------------------------------------------------------------------------- weights without use


@pytest.mark.parametrize(("value", "reason"), [(0.0, "zero"), (math.nan, "not finite"), (math.inf, "not finite")])
@pytest.mark.parametrize("init_weights", ["svd", "orthogonal"])
def test_a_weight_without_values_is_refused_and_the_model_unchanged(value, reason, init_weights):
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight.fill_(value)
    before = snapshot(model)
    with pytest.raises(ConversionError, match=rf"'bert\.encoder\.layer\.1\.output\.dense'.*received .*{reason}"):
        convert(model, init_weights=init_weights)
    assert_unchanged(model, before)
    convert(model, exclude_modules=["1.output.dense"])


def test_a_single_nan_is_found():
    model = bert()
    with torch.no_grad():
        model.bert.pooler.dense.weight[3, 5] = math.nan
    with pytest.raises(ConversionError, match=r"'bert\.pooler\.dense'.*not finite"):
        convert(model)


def test_weights_on_meta_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 6))
    before = snapshot(model)
    with pytest.raises(ConversionError, match=r"'0' must have values to factor; received weights on the meta device"):
        convert(model)
    assert_unchanged(model, before)


# ----------------------------------------------------------------------------------------------------------- trainable


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_only_factors_and_their_biases_train():
    model = convert(bert(), target_modules=["query", "value"], trainable="factors")
    expected = {f"{name}.{p}" for name in in_layers(QUERY_VALUE) for p in ("U", "S", "V", "bias")}
    assert trainable(model) == expected


def test_saved_modules_train_beside_the_factors_and_stay_dense():
    model = convert(bert(), trainable="factors", modules_to_save=["classifier", "pooler"], target_modules="all-linear")
    assert type(model.classifier) is type(model.bert.pooler.dense) is nn.Linear
    dense = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert trainable(model) == dense | {f"{name}.{p}" for name in factored(model) for p in ("U", "S", "V", "bias")}


def test_saved_modules_train_whatever_was_frozen_before():
    model = bert().requires_grad_(False)
    convert(model, modules_to_save=["classifier"], trainable="all")
    assert trainable(model) == {"classifier.weight", "classifier.bias"}


def test_factors_train_whatever_was_frozen_before():
    model = bert().requires_grad_(False)
    convert(model, target_modules=["query"], trainable="factors")
    assert trainable(model) == {f"{name}.{p}" for name in in_layers(QUERY_VALUE[:1]) for p in ("U", "S", "V", "bias")}


# ------------------------------------------------------------------------------------------------------------ ways back


@pytest.mark.parametrize("case", LINEAR_MODELS)
@pytest.mark.parametrize("back", [to_dense_model, fold_model])
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
        assert isinstance(layer, FoldedLayer if back is fold_model else (nn.Linear, Conv1D))
    assert not hasattr(model, "condlr_config")
    assert not hasattr(model, "condlr_conversion")


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


@pytest.mark.parametrize("back", [to_dense_model, fold_model])
def test_the_ways_back_of_convolutions(back):
    model = convert(resnet(), target_modules=EVERY_CONV)
    before = logits(model, pixels())
    assert len(factored(model)) == MODELS["resnet"].convolutions
    assert_same(logits(back(model), pixels()), before)


@pytest.mark.parametrize("back", [to_dense_model, fold_model])
def test_the_ways_back_keep_modes_and_dtype(back):
    model = convert(bert().to(torch.bfloat16).train()).requires_grad_(False)
    back(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.requires_grad for p in model.parameters()} == {False}
    assert all(m.training for m in model.modules())


def test_a_folded_model_has_as_many_weights_as_the_method_says():
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10, bias=False))
    fold_model(convert(model, r=4))
    assert sum(p.numel() for p in model.parameters()) == 4 * 50 + 30 + 4 * 40


def test_a_dense_model_can_be_converted_again():
    model = to_dense_model(convert(bert(), r=3))
    before = logits(model, token_inputs())
    assert_same(logits(convert(model, r=3), token_inputs()), before)  # its weights have rank 3


@pytest.mark.parametrize("back", [to_dense_model, fold_model])
def test_a_layer_cannot_replace_itself(back):
    with pytest.raises(ConversionError, match="received LowRankLinear"):
        back(LowRankLinear(6, 6, 2))


# ------------------------------------------------------------------------------------------------------------ in use


def generate(model, **arguments):
    ids = token_inputs(length=5)["input_ids"][:1]
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **arguments)


@pytest.mark.parametrize("build", [gpt2, llama])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate(build, use_cache):
    model = build()
    expected = generate(model, use_cache=use_cache)
    assert torch.equal(generate(lossless(model), use_cache=use_cache), expected)
    assert torch.equal(generate(fold_model(model), use_cache=use_cache), expected)


def test_generate_with_beams():
    model = gpt2()
    expected = generate(model, num_beams=3)
    assert torch.equal(generate(lossless(model), num_beams=3), expected)


def test_text_generation_pipeline():
    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"[UNK]": VOCAB - 1}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="w1")
    model = gpt2()

    def answer():
        pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        return pipeline("w3 w4 w5", max_new_tokens=6, do_sample=False)[0]["generated_text"]

    expected = answer()
    assert len(expected.split()) > 4
    lossless(model)
    assert answer() == expected


@pytest.mark.parametrize("back", [None, to_dense_model, fold_model])
def test_t5_in_bfloat16_reads_the_dtype_of_a_weight(back):
    model = t5().to(torch.bfloat16)
    inputs = MODELS["t5"].inputs()
    before = logits(model, inputs)
    lossless(model)
    if back is not None:
        back(model)
    assert model.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == torch.bfloat16
    after = logits(model, inputs)
    assert after.dtype == torch.bfloat16
    assert_same(after.float(), before.float(), 0.05)


def test_t5_generates():
    model = t5()
    inputs = token_inputs()
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(lossless(model).generate(**inputs, max_new_tokens=6, do_sample=False), expected)


def test_gradient_checkpointing():
    model = convert(bert().train(), rank_ratio=0.25)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model(**token_inputs()).logits.square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(**token_inputs()).logits.square().sum().backward()
    actual = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(actual) == len(expected) > 50
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b)


def test_ranks_from_a_ratio_are_multiples():
    """Of rank_multiple, rounded down; smaller ones, the full one and integers stay."""
    model = nn.ModuleDict({name: nn.Linear(60, 60) for name in ("a", "b", "c", "d")})
    config = CondLRConfig(
        rank_ratio=0.5,
        rank_multiple=8,
        rank_pattern={"b": 0.05, "c": 1.0, "d": 13},
        target_modules=["a", "b", "c", "d"],
    )
    get_robust_lowrank_model(model, config)
    assert [model[name].r for name in "abcd"] == [24, 3, 60, 13]
