"""Converted models in use: generation, pipelines, gradient checkpointing."""

import pytest
import tokenizers
import torch
import transformers
from torch import nn

from hf_condlr import fold_model, to_dense_model
from tests.conversion.conversions import assert_same, convert, lossless
from tests.models import (
    MODELS,
    VOCAB,
    bert,
    gpt2,
    llama,
    logits,
    t5,
)
from tests.models import tokens as token_inputs


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
    model.activation_checkpointing_enable()
    model(**token_inputs()).logits.square().sum().backward()
    actual = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(actual) == len(expected) > 50
    for a, b in zip(actual, expected, strict=True):
        assert_same(a, b)
