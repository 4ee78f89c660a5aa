"""Second moments for many layers: in turns where memory is short, once where they are shared or remembered."""

import copy

import pytest
import torch
from torch import nn

from hf_condlr import Calibration, CondLRConfig, get_robust_lowrank_model
from hf_condlr.conversion import second_moments, spectra
from hf_condlr.conversion.grams import Gram, gram_bytes
from hf_condlr.conversion.measuring import measure
from hf_condlr.errors import ConfigError, ConversionError
from tests.conversion.calibration_data import batches, make_bert
from tests.models import gpt2, llama

ATTENTION = "bert.encoder.layer.0.attention"


def count(monkeypatch, module, name):
    """The calls of a function, by their first two arguments."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: calls.append(a[:2]) or function(*a, **k))
    return calls


def converted(model, data, **config):
    config = CondLRConfig(**({"compression_ratio": 0.4, "rank_multiple": 2} | config))
    model = get_robust_lowrank_model(copy.deepcopy(model), config, calibration_data=data)
    return model, {name: layer.matrix() for name, layer in model.named_modules() if hasattr(layer, "matrix")}


@pytest.mark.parametrize("start", ["activation_aware", "fisher"])
def test_layers_take_turns_when_memory_is_short(start, monkeypatch):
    """A layer has C of 16² or 32² floats and F of as many, and memory is for a few of them: the result is the same."""
    model, data, passes = make_bert(), batches(), count(monkeypatch, second_moments, "measure")
    options = {"init_weights": start, "rank_allocation": "fisher" if start == "fisher" else "energy"}
    _, at_once = converted(model, data, **options)
    assert len(passes) == 1
    short = Calibration((batch for batch in data), max_bytes=9000, remember=False)
    groups = short.groups(model, [n for n, m in model.named_modules() if isinstance(m, nn.Linear)], gradients=True)
    assert max(map(len, groups)) > 1
    for group in groups:
        size = sum(second_moments._bytes(model, name, True) for name in group)
        assert size <= 9000 or len(group) == 1
    passes.clear()
    _, in_turns = converted(model, short, **options)
    assert len(passes) > 4  # for the ranks, and once more for the start
    assert at_once.keys() == in_turns.keys()
    for name, W in at_once.items():
        torch.testing.assert_close(in_turns[name], W, rtol=1e-4, atol=1e-5)
    assert len(short._kept) == 0


@pytest.mark.parametrize("start", ["activation_aware", "fisher"])
def test_what_fits_into_memory_is_measured_and_decomposed_once(start, monkeypatch):
    passes = count(monkeypatch, second_moments, "measure")
    eigh = count(monkeypatch, spectra, "robust_eigh")
    allocation = "fisher" if start == "fisher" else "energy"
    _, weights = converted(make_bert(), batches(), init_weights=start, rank_allocation=allocation)
    assert len(passes) == 1
    assert len(weights) <= len(eigh) <= 13  # one for each of the two layers' six and the pooler


def test_a_calibration_remembers_for_other_ratios_and_starts(monkeypatch):
    passes = count(monkeypatch, second_moments, "measure")
    model, calibration = make_bert(), Calibration(batches())
    for ratio, start in ((0.2, "fisher"), (0.5, "fisher"), (0.5, "activation_aware"), (0.5, "svd")):
        options = {"compression_ratio": ratio, "init_weights": start, "rank_allocation": "fisher"}
        _, found = converted(model, calibration, **options)
        seen = len(passes)
        _, expected = converted(model, calibration.data, **options)
        assert seen == 1 and found.keys() == expected.keys()
        del passes[seen:]
        for name, W in expected.items():
            torch.testing.assert_close(found[name], W)


def test_a_calibration_measures_what_it_has_not_yet(monkeypatch):
    passes = count(monkeypatch, second_moments, "measure")
    model, calibration = make_bert(), Calibration(batches())
    aware = "activation_aware"
    for targets, start in ((["query"], aware), (["query", "key"], aware), (["key"], "fisher")):
        converted(model, calibration, target_modules=targets, init_weights=start, compression_ratio=0.3)
    layers = [f"bert.encoder.layer.{i}.attention.self." for i in (0, 1)]
    expected = [[f"{layer}{name}" for layer in layers] for name in ("query", "key", "key")]
    assert [names for _, names in passes] == expected


def test_a_calibration_of_another_model_is_refused():
    calibration = Calibration(batches())
    converted(make_bert(), calibration, init_weights="activation_aware")
    with pytest.raises(ConversionError, match="remembers second moments of one dense model; received other weights in"):
        converted(make_bert(), calibration, init_weights="activation_aware")


@pytest.mark.parametrize("sequential", [False, True])
def test_passes_in_bfloat16_round_the_model_and_not_the_sums(sequential):
    model, names = make_bert().eval(), [f"{ATTENTION}.output.dense", "bert.encoder.layer.1.output.dense"]
    data = batches() * 20  # a prediction that is drawn differently counts little
    exact = measure(model, names, data, gradients=True)
    found = measure(model, names, data, gradients=True, autocast=torch.bfloat16)
    for kind, rounded in zip(exact, found, strict=True):
        for name in names:
            expected, G = kind[name].mean(), rounded[name].mean()
            assert G.dtype == expected.dtype and 1e-5 < (G - expected).norm() / expected.norm() < 0.05
    options = {"init_weights": "activation_aware", "sequential_calibration": sequential}
    _, plain = converted(model, Calibration(batches()), **options)
    _, half = converted(model, Calibration(batches(), autocast=torch.bfloat16), **options)
    for name, W in plain.items():  # another truncation where singular values are close, which is as good
        dense = model.get_submodule(name).weight
        assert half[name].dtype == W.dtype and not torch.equal(half[name], W)
        assert (half[name] - dense).norm().item() == pytest.approx((W - dense).norm().item(), rel=0.1)


# ------------------------------------------------------------------------------------------------------ shared inputs


def shared(model, data, names):
    """Sets of names with one Gram matrix."""
    inputs, _ = measure(model, names, data)
    groups = {}
    for name, gram in inputs.items():
        groups.setdefault(id(gram), set()).add(name)
    return sorted(groups.values(), key=min)


@pytest.mark.parametrize("gradients", [False, True])
def test_layers_that_read_the_same_tensor_share_a_matrix(gradients):
    model, data = make_bert(), batches()
    names = [f"{ATTENTION}.{name}" for name in ("self.query", "self.key", "self.value", "output.dense")]
    inputs, _ = measure(model, names, data, gradients=gradients)
    assert inputs[names[0]] is inputs[names[1]] is inputs[names[2]] is not inputs[names[3]]
    alone = measure(model, names[2:3], data)[0][names[2]]
    assert torch.equal(inputs[names[2]].mean(), alone.mean())


def test_gate_and_up_share_and_down_does_not():
    model = llama()
    names = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert shared(model, [{"input_ids": torch.arange(2, 14).reshape(2, 6)}], names) == [{names[2]}, set(names[:2])]


class Switching(nn.Module):
    """Two layers that read the same tensor, or from the second batch on different ones; or one more often."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.how, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), how, 0

    def forward(self, x):
        self.calls += 1
        if self.how == "freed":  # the second may lie where the first one lay
            return self.a(x * 2) + self.b(x * 3)
        y = self.a(x)
        if self.how == "in place":
            x.mul_(2)
        elif self.how == "later" and self.calls > 2:
            x = x * 2
        elif self.how == "twice" and self.calls > 2:
            self.a(x + 1)
        return self.b(x) + y


@pytest.mark.parametrize("how", ["same", "in place", "freed", "later", "twice"])
def test_inputs_are_shared_only_where_every_batch_has_them_equal(how):
    data = [torch.randn(6, 4) for _ in range(4)]
    model = Switching(how)
    groups = shared(model, [x.clone() for x in data], ["a", "b"])
    assert groups == ([{"a", "b"}] if how == "same" else [{"a"}, {"b"}])
    found = measure(Switching(how), ["a", "b"], [x.clone() for x in data])[0]
    for name in "ab":  # each alone, where nothing can be shared
        expected = measure(Switching(how), [name], [x.clone() for x in data])[0][name].mean()
        if how in ("same", "in place", "freed"):
            torch.testing.assert_close(found[name].mean(), expected)


def test_the_head_is_not_computed_for_inputs_of_layers_before_it():
    model, rows = gpt2(), []
    model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    data = [{"input_ids": torch.arange(2, 14).reshape(2, 6)}]
    measure(model, ["transformer.h.0.mlp.c_fc"], data)
    measure(model, ["lm_head"], data)
    measure(model, ["transformer.h.0.mlp.c_fc"], data, gradients=True)
    assert rows == [1, 6, 6]


@pytest.mark.parametrize("size", [5, 192, 400])
def test_the_blocks_of_a_gram_matrix_are_the_product(size):
    gram, X = Gram(size), torch.randn(50, size)
    assert gram.obstacle() == "none"
    for rows in X.split(20):
        gram.add(rows)
    gram.count = 50
    torch.testing.assert_close(gram.mean(), X.mT @ X / 50, rtol=1e-5, atol=1e-5)
    again = Gram(size)
    with torch.autocast("cpu", torch.bfloat16):
        for rows in X.split(20):
            again.add(rows)
    again.count = 50
    assert torch.equal(again.mean(), gram.mean())
    assert gram_bytes(size) == sum(block.nbytes for block in gram._blocks) <= 4 * (size**2 / 2 + 96 * size)


# --------------------------------------------------------------------------------------------------------------- misuse


def test_budgets_with_calibration_convert_fewer_parameters():
    for allocation in ("uniform", "energy"):
        model = make_bert()
        targets = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layer" in n}
        config = CondLRConfig(
            target_modules=r".*encoder\.layer.*",
            compression_ratio=0.4,
            rank_allocation=allocation,
            init_weights="activation_aware",
        )
        get_robust_lowrank_model(model, config, calibration_data=batches())
        report = model.condlr.report
        assert set(report.converted) | set(report.skipped) == set(targets)
        left = sum(layer.parameters for layer in report.converted.values()) + sum(targets[n] for n in report.skipped)
        assert 0.95 * 0.6 * sum(targets.values()) <= left <= 0.6 * sum(targets.values())
        assert set(report.skipped.values()) <= {"its factors would not be smaller"}


@pytest.mark.parametrize("start, data", [("activation_aware", None), ("svd", [1])])
def test_calibration_data_goes_with_its_start_only(start, data):
    with pytest.raises(ConfigError, match="calibration_data is what 'activation_aware' and 'fisher' need"):
        get_robust_lowrank_model(make_bert(), CondLRConfig(r=2, init_weights=start), calibration_data=data)
