"""Heads: classifiers and output embeddings stay dense, or are factored as the config says."""

import pytest
import torch
import transformers
from torch import nn

from hf_condlr.errors import ConversionError
from hf_condlr.layers import head_names
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
    yolos,
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


def detr():
    resnet = {"embedding_size": 4, "hidden_sizes": [4, 4], "depths": [1, 1], "layer_type": "basic"}
    layers = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        backbone_config=transformers.ResNetConfig(**resnet, out_features=["stage2"]),
        d_model=8,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        num_labels=LABELS,
        **layers,
    )
    return transformers.DetrForObjectDetection(config)


class Classifier(nn.Module):
    """A user's own module around a transformers model."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head


def compiled(model):
    return torch.compile(model, backend="eager")


def own_classifier():
    return Classifier(bert(transformers.BertModel), nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 9)))


FOUND = {
    "DETR": (detr, {"class_labels_classifier", "bbox_predictor.layers.2"}),
    "YOLOS": (yolos, {"class_labels_classifier.layers.2", "bbox_predictor.layers.2"}),
    "tokens": (lambda: bert(transformers.BertForTokenClassification), {"classifier"}),
    "answers": (lambda: bert(transformers.BertForQuestionAnswering, num_labels=2), {"qa_outputs"}),
    "masked words": (lambda: bert(transformers.BertForMaskedLM), {"cls.predictions.decoder"}),
    "next sentence": (lambda: bert(transformers.BertForNextSentencePrediction), {"cls.seq_relationship"}),
    "multiple choice": (lambda: bert(transformers.BertForMultipleChoice), {"classifier"}),
    "two heads": (lambda: bert(transformers.BertForPreTraining), {"cls.seq_relationship", "cls.predictions.decoder"}),
    "compiled": (lambda: compiled(bert()), {"_orig_mod.classifier"}),
    "parallel": (lambda: nn.DataParallel(bert()), {"module.classifier"}),
    "around a classifier": (lambda: Classifier(compiled(bert()), nn.Identity()), {"encoder._orig_mod.classifier"}),
    "own head": (own_classifier, {"head.2"}),
    "no transformers model": (lambda: nn.Sequential(nn.Linear(3, 3)), set()),
}


@pytest.mark.parametrize(("build", "heads"), FOUND.values(), ids=FOUND)
def test_heads_of_detectors_wrappers_and_own_modules(build, heads):
    assert head_names(build()) == heads


def test_a_head_behind_wrappers_stays_dense():
    for wrap in (compiled, nn.DataParallel):
        model = bert()
        convert(wrap(model))
        assert type(model.classifier) is nn.Linear
        assert len(factored(model)) == 13
