"""Folded models under torchao's quantization."""

import copy
import math

import numpy as np
import pytest
import torch

from hf_condlr import condition_report, fold_model
from hf_condlr.errors import CheckpointError
from hf_condlr.layers import compressed_layers
from tests.conversion.conversions import convert
from tests.models import MODELS, bert, t5

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's own
quantization = pytest.importorskip("torchao.quantization", exc_type=ImportError)

CONFIGS = {  # with the largest relative change of the logits of a tiny model
    "int8 weights": (quantization.Int8WeightOnlyConfig, {}, 0.05),
    "int8 dynamic": (quantization.Int8DynamicActivationInt8WeightConfig, {}, 0.1),
    "int4 weights": (
        quantization.IntxWeightOnlyConfig,
        {"weight_dtype": torch.int4, "granularity": quantization.PerAxis(0)},
        0.8,
    ),
}


def quantize(model, name):
    make, options, _ = CONFIGS[name]
    quantization.quantize_(model, make(**options))
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", ["folded", "pivoted"])
@pytest.mark.parametrize("architecture", ["bert", "t5"])  # T5 reads `wo.weight.dtype`
def test_a_folded_model_runs_quantized(architecture, form, name):
    model = fold_model(convert({"bert": bert, "t5": t5}[architecture](), rank_ratio=0.5), form).eval()
    inputs = MODELS[architecture].inputs()
    with torch.no_grad():
        expected = model(**inputs).logits
        actual = quantize(copy.deepcopy(model), name)(**inputs).logits
    assert not torch.equal(actual, expected)
    assert (actual - expected).norm() < CONFIGS[name][2] * expected.norm()


@pytest.mark.parametrize("form", ["folded", "pivoted"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_report_states_the_condition_of_what_the_quantized_weights_stand_for(name, form):
    model = quantize(fold_model(convert(bert(), rank_ratio=0.5), form), name)
    report = condition_report(model)
    layers = compressed_layers(model)
    assert {record.name for record in report.layers} == set(layers)
    for record in report.layers:
        layer = layers[record.name]
        up, down = (part.weight.dequantize().double().numpy() for part in (layer.up, layer.down))
        if form == "pivoted":
            up = np.concatenate((np.eye(layer.r), up))[layer.order]
        sigma = np.linalg.svd(up @ down, compute_uv=False)[: record.r]
        assert record.condition_number == pytest.approx(sigma[0] / sigma[-1], rel=1e-4)
        assert record.bound == math.inf and (record.orthonormality_error > 1e-4) == (form == "folded")


def test_factors_are_not_quantized():
    """torchao takes nn.Linear only: what is not folded stays as it is."""
    model = convert(bert(), rank_ratio=0.5)
    quantize(model, "int8 weights")
    assert all(type(layer.U) is torch.nn.Parameter for layer in compressed_layers(model).values())


def test_a_quantized_model_is_not_saved(tmp_path):
    model = quantize(fold_model(convert(bert(), rank_ratio=0.5)), "int8 weights")
    with pytest.raises(
        CheckpointError, match=r"holds floating-point weights; received a quantized bert.*Save the model b"
    ):
        model.save_pretrained(tmp_path)


def test_quantizing_while_loading_is_an_error(tmp_path):
    from transformers import TorchAoConfig

    model = fold_model(convert(bert(), rank_ratio=0.5))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="FactoredCheckpointConfig but you are passing a TorchAoConfig"):
        type(model).from_pretrained(tmp_path, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()))
