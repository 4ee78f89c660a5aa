"""TextModel: that a perturbation of embeddings is what it claims to be, in every kind of architecture."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput

from hf_condlr.errors import AttackError
from hf_condlr.robustness.attacks import TextModel
from hf_condlr.robustness.attacks.text import input_embedding
from tests.text_models import (
    ARCHITECTURES,
    EOS,
    LABELS,
    PAD,
    T5,
    bert_for,
    byte_tokenizer,
    classifier,
    token_batch,
    word_tokenizer,
)

each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def batch_for(name, padding_side="right"):
    tokens = token_batch(padding_side)
    if name in ("T5", "Bart"):  # else the decoder would read the encoder's tokens, which are to differ
        tokens["decoder_input_ids"] = token_batch()["input_ids"]
    return tokens


def hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


# ---------------------------------------------------------------------------------------------- the perturbation


@torch.no_grad()
@each_architecture
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_the_difference_of_two_embeddings_turns_one_token_into_the_other(name, padding_side):
    model = TextModel(classifier(name))
    tokens = batch_for(name, padding_side)
    editable = model.editable(tokens)
    assert torch.equal(editable, (tokens["input_ids"] > EOS) & tokens["attention_mask"].bool())
    other = {**tokens, "input_ids": torch.where(editable, tokens["input_ids"].flip(0, 1) % 20 + 4, tokens["input_ids"])}
    before = hooks(model)
    delta = model.embed(other) - model.embed(tokens)
    logits = model({**tokens, "perturbation": delta})
    assert logits.shape == (3, LABELS) and (logits - model(tokens)).abs().max() > 0.01
    torch.testing.assert_close(logits, model(other), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(other), classifier(name)(**other).logits, rtol=0, atol=0)
    assert hooks(model) == before


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Bert", "GPT2", "Bart", "Electra"])
def test_half_precision_models_give_float32_logits_and_round_once(name, dtype):
    """E' − E is exact in float32, so that E + (E' − E) is E'."""
    model = TextModel(classifier(name, dtype))
    tokens = batch_for(name)
    other = {**tokens, "input_ids": torch.where(model.editable(tokens), 5, tokens["input_ids"])}
    delta = model.embed(other) - model.embed(tokens)
    logits = model({**tokens, "perturbation": delta})
    assert logits.dtype == delta.dtype == torch.float32
    assert torch.equal(logits, model(other)) and not torch.equal(logits, model(tokens))


@each_architecture
def test_the_gradient_reaches_tokens_but_not_padding(name):
    model, tokens = TextModel(classifier(name)), batch_for(name)
    delta = torch.zeros_like(model.embed(tokens)).requires_grad_(True)
    model({**tokens, "perturbation": delta})[:, 0].sum().backward()
    size = delta.grad.norm(dim=-1)
    assert (size[model.editable(tokens)] > 0).all()
    assert (size[tokens["attention_mask"] == 0] < 1e-6).all()
    model.zero_grad()


@torch.no_grad()
def test_only_the_first_look_up_of_the_ids_is_perturbed():
    """GPT-2 looks token types up in the table of words."""
    model, tokens = TextModel(classifier("GPT2")), batch_for("GPT2")
    typed = {**tokens, "token_type_ids": tokens["input_ids"]}
    editable = model.editable(tokens)
    other = torch.where(editable, tokens["input_ids"].flip(0) % 20 + 4, tokens["input_ids"])
    delta = model.embed({**tokens, "input_ids": other}) - model.embed(tokens)
    expected = model({**typed, "input_ids": other})
    torch.testing.assert_close(model({**typed, "perturbation": delta}), expected, rtol=1e-5, atol=1e-5)


def test_encoder_decoders_have_their_encoder_perturbed():
    """Where the table is one module for both sides, the decoder's look-up, of the same ids, stays as it is."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def get_input_embeddings(self):
            return self.table

        def forward(self, input_ids):
            return torch.cat([self.table(input_ids).sum(1), self.table(input_ids).sum(1)], 1)

    model, ids = TextModel(Shared()), torch.tensor([[3, 4]])
    changed = model({"input_ids": ids, "perturbation": torch.ones(1, 2, 4)}) - model({"input_ids": ids})
    torch.testing.assert_close(changed, torch.tensor([[2.0] * 4 + [0.0] * 4]))


@pytest.mark.parametrize("name", ["Bert", "T5"])
def test_the_hook_is_removed_when_the_model_raises(name):
    model, tokens = TextModel(classifier(name)), batch_for(name)
    delta = torch.zeros_like(model.embed(tokens))
    before = hooks(model)
    three_dimensional = {**tokens, "attention_mask": tokens["input_ids"].float()[..., None]}
    with pytest.raises((ValueError, RuntimeError)):
        model({**three_dimensional, "perturbation": delta})
    with pytest.raises(AttackError, match=r"a perturbation must be \(batch, tokens, d\)"):
        model({**tokens, "perturbation": delta[..., :-1]})
    assert hooks(model) == before


def test_no_cache_is_made():
    seen = {}

    class Watched(transformers.GPT2ForSequenceClassification):
        def forward(self, input_ids=None, attention_mask=None, use_cache=None):
            seen["use_cache"] = use_cache
            return super().forward(input_ids, attention_mask=attention_mask, use_cache=use_cache)

    TextModel(Watched(classifier("GPT2").config).eval())(token_batch())
    assert seen == {"use_cache": False}


def test_the_state_is_the_models_alone():
    model = TextModel(classifier("Bert"), byte_tokenizer())
    assert set(model.state_dict()) == {f"model.{name}" for name in classifier("Bert").state_dict()}


# --------------------------------------------------------------------------------------------------------- texts


@torch.no_grad()
def test_texts_and_pairs_are_encoded_as_the_tokenizer_does():
    tokenizer = byte_tokenizer()
    model = bert_for(tokenizer)
    attacked = TextModel(model, tokenizer)
    texts = ["a fine film", "naïve ☃", ""]
    expected = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    assert torch.equal(attacked(texts), expected)
    assert torch.equal(attacked(attacked.encode(texts)), expected)
    pairs = [("a man", "a woman sleeps"), ("two dogs", "no dog")]
    encoded = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    assert encoded["token_type_ids"].any()
    assert torch.equal(attacked(pairs), model(**encoded).logits)
    assert torch.equal(attacked([list(pair) for pair in pairs]), model(**encoded).logits)


def test_texts_are_cut_to_what_the_model_takes():
    tokenizer = byte_tokenizer()
    long = ["x" * 300]
    assert TextModel(bert_for(tokenizer), tokenizer).encode(long)["input_ids"].shape == (1, 128)
    assert TextModel(bert_for(tokenizer), tokenizer, max_length=9).encode(long)["input_ids"].shape == (1, 9)
    short = byte_tokenizer(model_max_length=20)
    assert TextModel(bert_for(tokenizer), short, max_length=50).encode(long)["input_ids"].shape == (1, 20)
    roberta = TextModel(classifier("Roberta", vocab_size=len(tokenizer)), tokenizer)
    assert roberta(long).shape == (1, LABELS)  # 32 positions, of which the first is padding's
    assert roberta.max_length == 31
    t5 = transformers.T5Config(vocab_size=len(tokenizer), num_labels=LABELS, pad_token_id=PAD, **T5)
    assert TextModel(transformers.T5ForSequenceClassification(t5), tokenizer).max_length is None


def test_special_tokens_and_padding_are_not_editable_but_unknown_words_are():
    tokenizer = word_tokenizer(["good", "film"])
    model = TextModel(bert_for(tokenizer), tokenizer)
    editable = model.editable(["good strange film", "film [MASK]"])
    assert editable.tolist() == [[False, True, True, True, False], [False, True, False, False, False]]
    tokens = dict(model.encode(["good strange film", "film"]))
    assert torch.equal(model.editable(tokens), model.editable(["good strange film", "film"]))
    assert model.editable({"input_ids": tokens["input_ids"]})[1].tolist() == [False, True, False, False, False]
    tokenizer.unk_token = "[SEP]"  # as GPT-2's, whose only special token is all of them
    assert not TextModel(bert_for(tokenizer), tokenizer).editable(tokens)[:, -1].any()


def test_special_tokens_of_the_config_may_be_several():
    config = copy.deepcopy(classifier("Llama").config)
    config.eos_token_id = [EOS, 7]
    model = TextModel(transformers.LlamaForSequenceClassification(config))
    assert model.editable({"input_ids": torch.tensor([[1, 5, 7, 2]])}).tolist() == [[False, True, False, False]]


# -------------------------------------------------------------------------------------------------------- errors


def test_errors_of_the_batch():
    tokenizer = byte_tokenizer()
    model = TextModel(bert_for(tokenizer), tokenizer)
    with pytest.raises(AttackError, match="texts need a tokenizer; received 2 texts and tokenizer=None"):
        TextModel(bert_for(tokenizer))(["a", "b"])
    with pytest.raises(AttackError, match="a batch must hold at least one text"):
        model([])
    for texts in (["a", ("a", "b")], [("a", "b", "c")], [3], [("a", None)]):
        with pytest.raises(AttackError, match="list of strings, or a list of pairs of strings; received"):
            model(texts)
    with pytest.raises(AttackError, match="token tensors must have input_ids"):
        model({"attention_mask": torch.ones(1, 2)})
    for ids in (torch.ones(3, dtype=torch.long), torch.ones(1, 2), torch.ones(1, 0, dtype=torch.long)):
        with pytest.raises(AttackError, match=r"input_ids must be integers \(batch, tokens\), at least one"):
            model({"input_ids": ids})
    size = len(tokenizer)
    for ids, received in (([3, size], f"ids from 3 to {size}"), ([-1, 3], "ids from -1 to 3")):
        with pytest.raises(AttackError, match=f"vocabulary of {size}; received {received}"):
            model({"input_ids": torch.tensor([ids])})
    with pytest.raises(AttackError, match="max_length must be ≥ 1; received 0"):
        TextModel(bert_for(tokenizer), tokenizer, max_length=0)


def test_errors_of_a_missing_padding_token():
    tokenizer = byte_tokenizer()
    model = classifier("GPT2", vocab_size=len(tokenizer), pad_token_id=None)
    tokenizer.pad_token = None
    attacked = TextModel(model, tokenizer)
    assert attacked(["one text"]).shape == (1, LABELS)
    with pytest.raises(AttackError, match=r"needs a padding token.*tokenizer\.pad_token = tokenizer\.eos_token"):
        attacked(["two", "texts"])
    tokenizer.pad_token = "[PAD]"
    with pytest.raises(AttackError, match=r"2 samples and model\.config\.pad_token_id=None.*Set model\.config"):
        attacked(["two", "texts"])
    with pytest.raises(AttackError, match="agree on the padding token; received pad_token_id of 0 and 3"):
        TextModel(classifier("GPT2", vocab_size=len(tokenizer), pad_token_id=3), tokenizer)


def test_errors_of_models_that_are_no_text_classifiers():
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    for model in (nn.Linear(2, 2), transformers.ViTForImageClassification(config)):
        with pytest.raises(AttackError, match=rf"must have an input embedding.*received {type(model).__name__}"):
            TextModel(model)
    xlnet = transformers.XLNetConfig(vocab_size=37, d_model=16, n_layer=1, n_head=2, d_inner=24, pad_token_id=PAD)
    attacked, tokens = TextModel(transformers.XLNetForSequenceClassification(xlnet).eval()), token_batch()
    delta = torch.zeros(3, 7, 16)
    with pytest.raises(AttackError, match=r"must be looked up, as \(batch, tokens\)"):  # it turns them around
        attacked({**tokens, "perturbation": delta})


@pytest.mark.parametrize("output", [TokenClassifierOutput, SequenceClassifierOutput])
def test_errors_of_logits_that_are_not_of_classes(output):
    class Wrong(transformers.BertForSequenceClassification):
        def forward(self, input_ids, **inputs):
            shape = (*input_ids.shape, 3) if output is TokenClassifierOutput else (len(input_ids), 1)
            return output(logits=torch.zeros(shape))

    with pytest.raises(AttackError, match=r"must give logits \(batch, classes\), of two classes at least; received"):
        TextModel(Wrong(classifier("Bert").config))(token_batch())


def test_input_embeddings_of_encoder_decoders_are_the_ones_that_are_called():
    for name in ("T5", "Bart"):
        model = classifier(name)
        assert input_embedding(model) is model.get_encoder().get_input_embeddings()
