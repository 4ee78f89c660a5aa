"""Every common architecture: equal at full rank, trained three steps within the guarantee, and listed in the docs."""

import re

import pytest
import torch
import transformers
from torch import nn

from hf_condlr import CondLRConfig, attach_manifold_step, condition_report, get_robust_lowrank_model
from tests.paths import ROOT

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 40, "pad_token_id": 0}
IMAGE = {"image_size": 16, "patch_size": 8}
GROUPED = {**SIZES, "vocab_size": 40, "num_key_value_heads": 1}
ENCODER_DECODER = {
    **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40},
}
DOCS = ROOT / "docs" / "architectures.md"


def ids():
    return {"input_ids": torch.arange(2, 14).reshape(2, 6)}


def pair():
    return ids() | {"decoder_input_ids": torch.arange(2, 14).reshape(2, 6)}


def image(size=16):
    return {"pixel_values": torch.rand(2, 3, size, size)}


# name: model class, its config's arguments, inputs, converted layers, what stays dense
CASES = {
    "DeiT": ("DeiTForImageClassification", {**SIZES, **IMAGE}, image, 12, "classifier"),
    "BEiT": ("BeitForImageClassification", {**SIZES, **IMAGE, "out_indices": [0, 1]}, image, 12, "classifier"),
    "DINOv2": ("Dinov2ForImageClassification", {**SIZES, **IMAGE, "mlp_ratio": 2}, image, 12, "classifier"),
    "ResNet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        lambda: image(32),
        6,
        "classifier.1",
    ),
    "CLIP": (
        "CLIPModel",
        {
            "text_config": {**SIZES, **TEXT, "eos_token_id": 13, "bos_token_id": 1},
            "vision_config": {**SIZES, **IMAGE},
            "projection_dim": 8,
        },
        lambda: ids() | image(),
        26,
        "",
    ),
    "SegFormer": (
        "SegformerForImageClassification",
        {
            **{"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]},
            **{"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
        },
        image,
        12,
        "classifier",
    ),
    "RoBERTa": ("RobertaForSequenceClassification", {**SIZES, **TEXT}, ids, 13, "classifier.out_proj"),
    "ELECTRA": (
        "ElectraForSequenceClassification",
        {**SIZES, **TEXT, "embedding_size": 12},
        ids,
        14,
        "classifier.out_proj",
    ),
    "ALBERT": ("AlbertForSequenceClassification", {**SIZES, **TEXT, "embedding_size": 12}, ids, 8, "classifier"),
    "DeBERTa-v2": (
        "DebertaV2ForSequenceClassification",
        {**SIZES, **TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
        ids,
        17,
        "classifier",
    ),
    "ModernBERT": (
        "ModernBertForSequenceClassification",
        {**SIZES, **TEXT, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
        ids,
        9,
        "classifier",
    ),
    "MPNet": ("MPNetForSequenceClassification", {**SIZES, "vocab_size": 40}, ids, 13, "classifier.out_proj"),
    "GPT-NeoX": ("GPTNeoXForCausalLM", {**SIZES, "vocab_size": 40}, ids, 8, "lm_head"),
    "Qwen2": ("Qwen2ForCausalLM", GROUPED, ids, 14, "lm_head"),
    "Mistral": ("MistralForCausalLM", GROUPED, ids, 14, "lm_head"),
    "Gemma": ("GemmaForCausalLM", {**GROUPED, "head_dim": 8}, ids, 14, "lm_head"),
    "Phi": ("PhiForCausalLM", {**SIZES, "vocab_size": 40}, ids, 12, "lm_head"),
    "OPT": (
        "OPTForCausalLM",
        {
            **{"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"ffn_dim": 24, "word_embed_proj_dim": 12, "max_position_embeddings": 32},
        },
        ids,
        14,
        "lm_head",
    ),
    "BART": (
        "BartForConditionalGeneration",
        {**ENCODER_DECODER, "max_position_embeddings": 32},
        pair,
        16,
        "lm_head",
    ),
    "mT5": (
        "MT5ForConditionalGeneration",
        {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
        pair,
        18,
        "lm_head",
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        {
            **ENCODER_DECODER,
            **{"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 12, "pad_token_id": 0},
            **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
        },
        lambda: {"input_features": torch.rand(2, 8, 20), "decoder_input_ids": ids()["input_ids"]},
        16,
        "proj_out",
    ),
    "Wav2Vec2": (
        "Wav2Vec2ForSequenceClassification",
        {
            **{**SIZES, "vocab_size": 40, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3]},
            **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 12},
        },
        lambda: {"input_values": torch.rand(2, 400)},
        14,
        "classifier",
    ),
    "Mixtral": (
        "MixtralForCausalLM",
        {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2},
        ids,
        8,
        "lm_head",
    ),
}
NAMED = {"ResNet": r".*\.convolution"}  # convolutions are converted when named


def build(case):
    class_name, settings, inputs, *_ = CASES[case]
    model_class = getattr(transformers, class_name)
    return model_class(model_class.config_class(**settings)).eval(), inputs()


def convert(case, model, **kwargs):
    return get_robust_lowrank_model(model, CondLRConfig(target_modules=NAMED.get(case, "all-linear"), **kwargs))


def output(model, inputs):
    result = model(**inputs)
    return result.logits if "logits" in result else result.logits_per_image


@pytest.mark.parametrize("case", CASES)
def test_full_rank_equals_dense_and_layers_are_counted(case):
    """To 1e-5 of the largest logit (measured: at most 7e-6)."""
    model, inputs = build(case)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    with torch.no_grad():
        expected = output(model, inputs)
        convert(case, model, rank_ratio=1.0, tau="inf")
        found = output(model, inputs)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    *_, converted, dense = CASES[case]
    report = model.condlr.report
    assert len(report.converted) == converted
    assert ", ".join(sorted(linear - set(report.converted))) == dense


@pytest.mark.parametrize("case", CASES)
def test_three_steps_keep_the_guarantee(case):
    model, inputs = build(case)
    convert(case, model, rank_ratio=0.5, tau=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    attach_manifold_step(optimizer, model)
    before = output(model.eval(), inputs).detach()
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        output(model, inputs).square().mean().backward()
        optimizer.step()
        report = condition_report(model)
        assert report.max_condition_number <= 1.1 * (1 + 1e-4)
        assert report.max_orthonormality_error <= 1e-5
    after = output(model.eval(), inputs).detach()
    assert torch.isfinite(after).all() and not torch.equal(before, after)


def test_fused_experts_are_reported():
    model, _ = build("Mixtral")
    convert("Mixtral", model, rank_ratio=0.5)
    experts = {f"model.layers.{i}.mlp.experts" for i in range(2)}
    assert set(model.condlr.report.skipped) == experts
    assert all("fused into tensors of three dimensions" in why for why in model.condlr.report.skipped.values())


@pytest.mark.parametrize("case", CASES)
def test_the_docs_tell_what_is_converted(case):
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (.*?) \|", DOCS.read_text(), re.MULTILINE)
    listed = {name: (int(count), dense.replace("`", "")) for name, count, dense in rows}
    *_, converted, dense = CASES[case]
    assert listed[case] == (converted, dense or "none")
