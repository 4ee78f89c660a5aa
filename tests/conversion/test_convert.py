"""Conversion in place: the model stays what it was, but for its layers."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from hf_condlr import CondLRConfig, LowRankConv2d, LowRankLinear, get_robust_lowrank_model
from hf_condlr.conversion.factorizations import FACTORIZATIONS
from hf_condlr.errors import ConvergenceError, ConversionError
from hf_condlr.linalg import truncated_svd
from tests.conversion.conversions import (
    ALL_MODELS,
    LAST_QUERY,
    LINEAR_MODELS,
    QUERY,
    assert_same,
    assert_unchanged,
    convert,
    factored,
    lossless,
    snapshot,
)
from tests.models import (
    bert,
    dense_layers,
    gpt2,
    logits,
    t5,
)
from tests.models import tokens as token_inputs


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
    assert model.condlr.config is config
    assert set(model.condlr.report.converted) == set(factored(model))
    assert not any("condlr" in key for key in model.state_dict())
    assert model.config.to_dict() == model_config


def test_the_config_is_not_changed():
    config = CondLRConfig(r=2, rank_pattern={"query": 1}, modules_to_save=["classifier"])
    before = copy.deepcopy(config)
    get_robust_lowrank_model(bert(), config)
    assert config == before


def test_report_in_words():
    model = convert(gpt2(), r=2, head="low_rank")
    first, *rest = str(model.condlr.report).splitlines()
    # 2 × (16·48 + 16·16 + 2·16·64) weights; 2 × (2·64 + 2·32 + 2·2·80 + 4·4) in factors
    assert first.startswith("8 layers converted, 6,144 weights became 1,056")
    assert len(rest) == 1
    assert "lm_head" in rest[0] and "tied" in rest[0]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same_and_are_independent(duplicate):
    model = convert(bert(), tau=0.3)
    twin = duplicate(model)
    assert torch.equal(logits(twin, token_inputs()), logits(model, token_inputs()))
    assert twin.condlr.config == model.condlr.config
    before = logits(model, token_inputs())
    with torch.no_grad():
        twin.bert.pooler.dense.S.zero_()
    assert torch.equal(logits(model, token_inputs()), before)


def test_state_dict_fits_a_model_converted_alike():
    model, other = convert(bert(), r=3), convert(bert(), r=3, init_weights="orthogonal")
    assert not torch.allclose(logits(other, token_inputs()), logits(model, token_inputs()))
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, token_inputs()), logits(model, token_inputs()))


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


@pytest.mark.parametrize("error", [ConvergenceError("an SVD", received="NaN", remedy="None."), MemoryError("full")])
def test_an_error_in_the_middle_names_the_layer_and_leaves_the_model_as_it_was(error, monkeypatch):
    model, calls = bert(), []
    before = snapshot(model)

    def fails_at_last(W, r):
        calls.append(W)
        if len(calls) == 13:
            raise error
        return truncated_svd(W, r)

    monkeypatch.setitem(FACTORIZATIONS, "svd", fails_at_last)
    with pytest.raises(type(error)) as caught:
        convert(model, trainable="factors")
    said = str(caught.value) + str(getattr(caught.value, "__notes__", ""))
    assert "'bert.pooler.dense'" in said
    assert_unchanged(model, before)
