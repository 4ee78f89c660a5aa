"""Heads: classifiers and output embeddings stay dense, or are factored as the config says."""

import pytest
import transformers
from torch import nn

from hf_condlr.errors import ConversionError
from tests.conversion.conversions import QUERY_VALUE, assert_same, convert, factored, in_layers, lossless
from tests.models import (
    LABELS,
    MODELS,
    VOCAB,
    bert,
    gpt2,
    llama,
    logits,
    pixels,
    siglip,
    t5,
)

CLASSIFIERS = ["vit", "swin", "convnext", "bert", "distilbert"]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_classifier_stays_dense(name):
    model = MODELS[name].build()
    head = model.classifier
    convert(model)
    assert model.classifier is head
    assert "classifier" not in model.condlr.report.converted


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
    assert list(model.condlr.report.skipped) == ["lm_head"]
    assert "tied" in model.condlr.report.skipped["lm_head"]
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
    assert head not in model.condlr.report.converted
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
