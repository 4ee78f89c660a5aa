"""ONNX files that ONNX Runtime reads: the outputs of the factored model, at the size of its folded parameters."""

import copy
import sys

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
)

from hf_condlr import CondLRConfig, export_onnx, fold_model, get_robust_lowrank_model
from hf_condlr.errors import ConversionError, MissingExtraError
from tests.models import MODELS, bert, logits, tokens, yolos

pytestmark = pytest.mark.export

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def outputs(path, inputs):
    """{name: array} of all outputs of the graph."""
    session = ort.InferenceSession(path)
    arrays = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return dict(zip([output.name for output in session.get_outputs()], arrays, strict=True))


def run(path, inputs):
    return outputs(path, inputs)["logits"]


def factored(case):
    model = MODELS[case].build()
    inputs = {name: x for name, x in MODELS[case].inputs().items() if name in ("pixel_values", "input_ids")}
    if "input_ids" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return get_robust_lowrank_model(model, CondLRConfig(rank_ratio=0.5)), inputs


@pytest.mark.parametrize("case", ["vit", "llama"])
def test_onnx_runtime_agrees(case, tmp_path):
    """To 1e-5 (measured: 4e-6), also for another batch size and length than the example's."""
    model, inputs = factored(case)
    path = export_onnx(model, tmp_path / "model.onnx")
    for rows in (inputs, {name: torch.cat([x, x.flip(0), x]) for name, x in inputs.items()}):
        rows = {name: x[:, :5] if x.dim() == 2 else x for name, x in rows.items()}
        assert np.abs(run(path, rows) - logits(model, rows).numpy()).max() < 1e-5
    assert sorted(tmp_path.iterdir()) == [path]  # all weights in the one file


@pytest.mark.parametrize("case", ["vit", "resnet"])
def test_a_pivoted_model_is_exported_as_it_is(case, tmp_path):
    targets = r".*\.convolution" if case == "resnet" else "all-linear"
    model, inputs = MODELS[case].build(), MODELS[case].inputs()
    get_robust_lowrank_model(model, CondLRConfig(rank_ratio=0.5, target_modules=targets))
    fold_model(model, "pivoted")
    path = export_onnx(model, tmp_path / "model.onnx", inputs=inputs)
    assert_outputs_agree(path, model, inputs)


def assert_outputs_agree(path, model, inputs):
    found = outputs(path, inputs)
    with torch.no_grad():
        expected = model(**inputs)
    assert set(found) == {name for name, value in expected.items() if isinstance(value, torch.Tensor)}
    for name, array in found.items():
        assert np.abs(array - expected[name].numpy()).max() < 1e-5, name


def test_question_answering_has_both_logits(tmp_path):
    model = bert(BertForQuestionAnswering, num_labels=2)
    get_robust_lowrank_model(model, CondLRConfig(rank_ratio=0.5))
    path = export_onnx(model, tmp_path / "model.onnx")
    inputs = tokens(batch=3, length=5)
    assert list(outputs(path, inputs)) == ["start_logits", "end_logits"]
    assert_outputs_agree(path, model, inputs)


def test_source_and_target_of_a_translation_have_their_own_lengths(tmp_path):
    model = get_robust_lowrank_model(MODELS["t5"].build(), CondLRConfig(rank_ratio=0.5))
    path = export_onnx(model, tmp_path / "model.onnx")
    for source, target in ((7, 4), (3, 9)):
        inputs = {**tokens(length=source), "decoder_input_ids": tokens(length=target)["input_ids"]}
        assert_outputs_agree(path, model, inputs)


def test_detection_keeps_its_boxes(tmp_path):
    model = get_robust_lowrank_model(yolos(), CondLRConfig(rank_ratio=0.5))
    inputs = {"pixel_values": torch.rand(2, 3, 16, 16)}
    path = export_onnx(model, tmp_path / "model.onnx", inputs=inputs)
    assert {"logits", "pred_boxes"} <= set(outputs(path, inputs))
    assert_outputs_agree(path, model, inputs)


def test_the_file_is_no_larger_than_the_folded_parameters_and_a_tenth(tmp_path):
    config = BertConfig(
        vocab_size=100, hidden_size=256, num_hidden_layers=1, num_attention_heads=4, intermediate_size=1024
    )
    model = get_robust_lowrank_model(BertForSequenceClassification(config).eval(), CondLRConfig(rank_ratio=0.5))
    path = export_onnx(model, tmp_path / "model.onnx")
    folded = sum(p.numel() * p.element_size() for p in fold_model(copy.deepcopy(model)).parameters())
    assert path.stat().st_size < 1.1 * folded


def test_the_model_stays_as_it_is_and_examples_may_be_given(tmp_path):
    model = MODELS["resnet"].build()
    get_robust_lowrank_model(model, CondLRConfig(target_modules=r".*\.convolution", rank_ratio=0.5))
    before = copy.deepcopy(model).state_dict()
    inputs = MODELS["resnet"].inputs()
    with pytest.raises(ConversionError, match=r"an example of the model's inputs.*Pass inputs="):
        export_onnx(model, tmp_path / "model.onnx")
    path = export_onnx(model, tmp_path / "model.onnx", inputs=inputs)
    assert np.abs(run(path, inputs) - logits(model, inputs).numpy()).max() < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'hf_condlr\[onnx\]'"):
        export_onnx(factored("vit")[0], tmp_path / "model.onnx")


@pytest.mark.parametrize("case", ["vit", "bert"])
def test_torch_export_and_compile(case):
    model, inputs = factored(case)
    program = torch.export.export(model, (), inputs)
    assert torch.allclose(program.module()(**inputs).logits, logits(model, inputs), atol=1e-6)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(**inputs).logits, logits(model, inputs), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inference(dtype):
    model, inputs = factored("vit")
    expected = logits(model, inputs)
    found = logits(model.to(dtype), {name: x.to(dtype) for name, x in inputs.items()})
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
