"""Second moments for many layers: in turns where memory is short, and only where the config needs them."""

import pytest
import torch
from torch import nn

from hf_condlr import CondLRConfig, get_robust_lowrank_model
from hf_condlr.conversion import second_moments
from hf_condlr.conversion.second_moments import Calibration
from hf_condlr.errors import ConfigError
from tests.conversion.calibration_data import batches, make_bert


def linear_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layer" in name]


@pytest.mark.parametrize("start", ["activation_aware", "fisher"])
def test_layers_take_turns_when_memory_is_short(start, monkeypatch):
    """C is 16² or 32² floats a layer, F as many, so that memory holds a few layers at a time."""
    model, config = make_bert(), CondLRConfig(r=2, init_weights=start)
    names, turns = linear_layers(model), []
    measure = second_moments.input_covariances
    monkeypatch.setattr(second_moments, "input_covariances", lambda m, n, d: turns.append(n) or measure(m, n, d))
    data = batches()
    at_once = dict(Calibration(model, config, data).second_moments(names))
    assert turns == [names]
    calibration = Calibration(model, config, (batch for batch in data), max_bytes=9000)
    found = []
    for name, of_layer in calibration.second_moments(names):
        found.append(name)
        held = [X for pair in calibration._kept.values() for X in pair if X is not None]
        assert sum(X.numel() * 4 for X in held) <= 9000 or len(calibration._kept) == 1
        for X, expected in zip(of_layer, at_once[name], strict=True):
            assert (X is None) == (expected is None)
            if X is not None:
                torch.testing.assert_close(X, expected)
    assert found == names and len(turns) > 3


def test_what_fits_into_memory_is_measured_once_for_ranks_and_start(monkeypatch):
    calls = []
    measure = second_moments.input_covariances
    monkeypatch.setattr(second_moments, "input_covariances", lambda *args: calls.append(args[1]) or measure(*args))
    config = CondLRConfig(compression_ratio=0.4, rank_allocation="energy", init_weights="activation_aware")
    get_robust_lowrank_model(make_bert(), config, calibration_data=batches())
    assert len(calls) == 1


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
