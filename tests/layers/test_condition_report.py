"""`condition_report` against NumPy's SVD of the dense weight, in float64."""

import copy
import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from hf_condlr import (
    CondLRConfig,
    LowRankConv2d,
    LowRankLinear,
    attach_manifold_step,
    condition_report,
    fold_model,
    get_robust_lowrank_model,
)
from hf_condlr.errors import CondLRError
from tests.linalg.reference import array
from tests.models import bert

PNG = b"\x89PNG\r\n\x1a\n"


def strict_json(values):
    return json.loads(json.dumps(values, allow_nan=False))


def network(**arguments):
    """Three factored layers of different shapes, a dense one, and one without parameters."""
    return nn.Sequential(
        LowRankConv2d(3, 6, (2, 3), 4, **arguments),
        nn.ReLU(),
        LowRankLinear(12, 20, 5, bias=False, **arguments),
        LowRankLinear(20, 1, 1, **arguments),
        nn.Linear(1, 4),
    )


@torch.no_grad()
def disturb(model, names=("S",)):
    """Random entries: a core of any condition, or factors that are not orthonormal."""
    for name, p in model.named_parameters():
        if name.rpartition(".")[2] in names:
            p.copy_(torch.randn_like(p))
    return model


def spectrum(layer):
    """The r leading singular values of W = U S Vᵀ."""
    U, S, V = (array(p) for p in (layer.U, layer.S, layer.V))
    return np.linalg.svd(U @ S @ V.T, compute_uv=False)[: layer.r]


def core(*sigma, tau=0.1):
    layer = LowRankLinear(7, 6, len(sigma), tau=tau)
    layer.set_factors(layer.U, torch.diag(torch.tensor(sigma)), layer.V)
    return layer


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("disturbed", [(), ("S",), ("U", "S", "V")], ids=["fresh", "core", "not orthonormal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_spectrum_and_condition_are_those_of_the_dense_weight(disturbed, dtype):
    model = disturb(network(dtype=dtype), disturbed)
    report = condition_report(model)
    assert [layer.name for layer in report.layers] == ["0", "2", "3"]
    for record in report.layers:
        layer = model.get_submodule(record.name)
        sigma = spectrum(layer)
        assert record.singular_values == pytest.approx(sigma.tolist(), rel=1e-10)
        assert record.condition_number == pytest.approx(sigma[0] / sigma[-1], rel=1e-9)
        error = max(np.linalg.norm(array(U).T @ array(U) - np.eye(layer.r)) for U in (layer.U, layer.V))
        assert record.orthonormality_error == pytest.approx(error, rel=1e-8, abs=1e-14)
        assert record.r == layer.r
        assert record.bound == (layer.bound if record.condition_number <= layer.bound else math.inf)
    kappa = [record.condition_number for record in report.layers]
    assert report.max_condition_number == max(kappa)
    assert report.mean_condition_number == pytest.approx(np.mean(kappa))
    assert report.max_orthonormality_error == max(record.orthonormality_error for record in report.layers)


def test_condition_is_measured_at_every_scale():
    for scale in (1e-30, 1e30):
        record = condition_report(nn.Sequential(core(3 * scale, scale))).layers[0]
        assert record.condition_number == pytest.approx(3, rel=1e-5)
        assert record.singular_values == pytest.approx([3 * scale, scale], rel=1e-5)


def test_condition_of_a_singular_core_is_infinite_or_beyond_rounding():
    assert condition_report(nn.Sequential(core(2.0, 1.0, 0.0))).max_condition_number > 1e15


def test_sizes_are_those_of_the_model_factored_and_dense():
    model = bert()
    dense = sum(p.numel() for p in model.parameters())
    get_robust_lowrank_model(model, CondLRConfig(r=3))
    report = condition_report(model)
    assert report.dense_parameters == dense
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.compression == pytest.approx(1 - report.parameters / dense)
    folded = fold_model(copy.deepcopy(model))
    assert report.folded_parameters == sum(p.numel() for p in folded.parameters())
    assert report.folded_compression == pytest.approx(1 - report.folded_parameters / dense)
    record = next(layer for layer in report.layers if layer.name.endswith("layer.1.intermediate.dense"))
    assert (record.shape, record.r) == ((24, 16), 3)
    assert record.parameters == 3 * (24 + 16) + 9 + 24
    assert record.folded_parameters == 3 * (24 + 16) + 24
    assert record.dense_parameters == 24 * 16 + 24


def test_sizes_of_a_convolution_and_of_a_layer_without_bias():
    conv, linear, row = condition_report(network()).layers
    assert (conv.shape, conv.parameters, conv.dense_parameters) == ((6, 18), 4 * 24 + 16 + 6, 6 * 18 + 6)
    assert (linear.shape, linear.parameters, linear.dense_parameters) == ((20, 12), 5 * 32 + 25, 240)
    assert (row.shape, row.parameters, row.dense_parameters) == ((1, 20), 21 + 1 + 1, 21)


def test_the_model_is_left_alone():
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    condition_report(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


# -------------------------------------------------------------------------------------------------------------- bounds


def trained(model, handle_arguments=None, steps=1):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach_manifold_step(optimizer, model, **(handle_arguments or {}))
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 7)).square().sum().backward()
        optimizer.step()
    return model


def test_bound_before_and_after_a_step():
    model = nn.Sequential(core(5.0, 1.0, tau=0.1))
    before = condition_report(model).layers[0]
    assert (before.bound, before.condition_number) == (math.inf, pytest.approx(5, rel=1e-5))
    after = condition_report(trained(model)).layers[0]
    assert after.bound == pytest.approx(1.1)
    assert after.condition_number <= 1.1 * (1 + 1e-4)


def test_bound_during_a_warm_up():
    """1 + τ(t) = κ_0^{1−p} (1+τ)^p: after 1 of 4 steps from κ_0 = 5 to 1.1."""
    model = trained(nn.Sequential(core(5.0, 1.0, tau=0.1)), {"warmup_steps": 4})
    record = condition_report(model).layers[0]
    assert record.bound == pytest.approx(5**0.75 * 1.1**0.25, rel=1e-5)
    assert record.condition_number <= record.bound * (1 + 1e-4)


def test_bound_of_a_core_that_obeys_it_from_the_start():
    assert condition_report(nn.Sequential(core(1.2, 1.0, tau=0.5))).layers[0].bound == 1.5


def test_bound_where_there_is_none():
    model = nn.Sequential(core(5.0, 1.0, tau=math.inf))
    assert condition_report(model).layers[0].bound == math.inf
    assert condition_report(trained(model)).layers[0].bound == math.inf


# ------------------------------------------------------------------------------------------------- table and dictionary


def test_table_has_a_line_for_each_layer_and_the_totals():
    model = nn.Sequential(core(5.0, 1.0), nn.ReLU(), LowRankLinear(6, 500, 2, tau=0.25))
    header, rule, first, second, *_ = lines = str(condition_report(model)).splitlines()
    assert ["layer" in header, set(rule)] == [True, {"-"}]
    assert first.split()[:5] == ["0", "6×7", "2", "5", "inf"]
    assert second.split()[:5] == ["2", "500×6", "2", "1", "1.25"]
    assert "1,516" in second  # 2 · 506 + 4 + 500
    assert f"{1516 / 3500:.1%}" in second
    assert len({len(line) for line in (header, rule, first, second)}) == 1
    totals = "\n".join(lines[5:])
    assert "2 layers" in totals
    assert "κ at most 5, mean 3" in totals
    assert "1,552" in totals  # and 26 + 4 + 6 of the first
    assert "3,548" in totals


def test_table_is_aligned_for_long_names():
    lines = str(condition_report(get_robust_lowrank_model(bert(), CondLRConfig(r=2)))).splitlines()
    assert len({len(line) for line in lines[:15]}) == 1
    assert lines[2].startswith("bert.encoder.layer.0.attention.self.query ")


def test_dictionary_is_strict_json_and_holds_the_numbers():
    report = condition_report(disturb(network()))
    values = strict_json(report.to_dict())
    assert values["parameters"] == report.parameters
    assert values["dense_parameters"] == report.dense_parameters
    assert values["folded_parameters"] == report.folded_parameters
    assert values["max_condition_number"] == report.max_condition_number
    assert values["mean_condition_number"] == report.mean_condition_number
    assert values["max_orthonormality_error"] == report.max_orthonormality_error
    for record, layer in zip(values["layers"], report.layers, strict=True):
        assert record == {
            "name": layer.name,
            "shape": list(layer.shape),
            "r": layer.r,
            "condition_number": layer.condition_number,
            "bound": layer.bound if math.isfinite(layer.bound) else None,
            "orthonormality_error": layer.orthonormality_error,
            "singular_values": layer.singular_values,
            "parameters": layer.parameters,
            "folded_parameters": layer.folded_parameters,
            "dense_parameters": layer.dense_parameters,
        }


BROKEN = {
    "no bound": {"tau": math.inf},
    "zero core": {"S": 0.0},
    "core with NaN": {"S": math.nan},
    "infinite core": {"S": math.inf},
    "basis with NaN": {"U": math.nan},
    "infinite basis": {"V": math.inf},
}


def broken_model(tau=0.1, **values):
    """The broken layer between two good ones."""
    model = nn.Sequential(LowRankLinear(7, 6, 2), LowRankLinear(6, 7, 2, tau=tau), LowRankLinear(7, 6, 2))
    with torch.no_grad():
        for name, value in values.items():
            getattr(model[1], name).fill_(value)
    return model


@pytest.mark.parametrize("values", BROKEN.values(), ids=BROKEN)
def test_dictionary_of_a_broken_model_is_strict_json(values):
    layers = strict_json(condition_report(broken_model(**values)).to_dict())["layers"]
    assert [layer["condition_number"] for layer in layers][::2] == pytest.approx([1, 1], rel=1e-5)
    assert ("tau" in values) is (layers[1]["condition_number"] is not None)


@pytest.mark.parametrize("values", BROKEN.values(), ids=BROKEN)
def test_table_of_a_broken_model(values):
    assert len(str(condition_report(broken_model(**values))).splitlines()) >= 7


@pytest.mark.parametrize("name", ["zero core", "core with NaN", "infinite core", "basis with NaN", "infinite basis"])
def test_a_broken_layer_is_not_hidden_by_the_others(name):
    report = condition_report(broken_model(**BROKEN[name]))
    assert not math.isfinite(report.layers[1].condition_number)
    assert not math.isfinite(report.max_condition_number)
    assert not math.isfinite(report.mean_condition_number)
    if "basis" in name:
        assert not math.isfinite(report.max_orthonormality_error)


def test_a_model_without_factored_layers_is_refused():
    with pytest.raises(CondLRError, match=r"must have factored layers; received none.*Call get_robust_lowrank_model"):
        condition_report(nn.Sequential(nn.Linear(3, 3)))


@pytest.mark.parametrize(("form", "saved"), [("folded", 1), ("pivoted", 2)])
def test_a_folded_model_has_the_same_spectra(form, saved):
    model = disturb(network())
    expected = condition_report(model)
    report = condition_report(fold_model(model, form))
    before_of = {layer.name: layer for layer in expected.layers}
    of_full_rank = {layer.name for layer in expected.layers if layer.r == min(layer.shape)}
    pivoted_are_dense = of_full_rank if form == "pivoted" else set()
    assert {layer.name for layer in report.layers} == set(before_of) - pivoted_are_dense != set()
    for layer in report.layers:
        before = before_of[layer.name]
        assert (layer.name, layer.shape, layer.r, layer.bound) == (before.name, before.shape, before.r, math.inf)
        assert layer.condition_number == pytest.approx(before.condition_number, rel=1e-5)
        assert layer.singular_values == pytest.approx(before.singular_values, rel=1e-5)
        assert layer.parameters == layer.folded_parameters == before.parameters - saved * before.r**2
    assert report.dense_parameters == expected.dense_parameters
    assert str(report) and strict_json(report.to_dict())


# ---------------------------------------------------------------------------------------------------------------- plot


@pytest.mark.parametrize("as_string", [True, False])
def test_plot_writes_a_picture_and_returns_its_path(as_string, tmp_path):
    path = tmp_path / "report.png"
    returned = condition_report(disturb(network())).plot(str(path) if as_string else path)
    assert returned == path
    assert path.read_bytes().startswith(PNG)
    assert path.stat().st_size > 5_000


def test_the_ending_of_the_path_chooses_the_format(tmp_path):
    path = condition_report(network()).plot(tmp_path / "report.svg")
    assert "<svg" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("values", BROKEN.values(), ids=BROKEN)
def test_plot_of_a_broken_model(values, tmp_path):
    path = condition_report(broken_model(**values)).plot(tmp_path / "report.png")
    assert path.read_bytes().startswith(PNG)


def test_plot_leaves_pyplot_and_its_backend_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    path = condition_report(network()).plot(tmp_path / "report.png")
    assert path.read_bytes().startswith(PNG)


def test_plot_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CondLRError, match=r"needs matplotlib; received .*pip install 'hf_condlr\[plot\]'"):
        condition_report(network()).plot(tmp_path / "report.png")
    assert not (tmp_path / "report.png").exists()
