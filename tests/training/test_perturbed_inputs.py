"""What adversarial training can perturb, and what it refuses."""

import copy

import pytest
import torch
from torch import nn
from transformers import ViTImageProcessorPil

from hf_condlr import AdversarialArguments, AdversarialTraining, CondLRTrainer
from hf_condlr.errors import AttackError
from tests.models import tokens
from tests.training.tiny import arguments, assert_equal_weights, convert, dense_vit
from tests.training.tiny_images import EPSILON, FGSM, MEAN, PGD_, STD, adversary, batch_of, dense_text, image_rows


def test_explicit_normalisation_takes_the_place_of_a_processor():
    model, inputs = dense_vit(), batch_of(image_rows(4))
    options = {"adversarial_image_mean": [MEAN], "adversarial_image_std": [STD]}
    with adversary(**FGSM, **options).batch(model, inputs) as batch:
        moved = (batch.inputs["pixel_values"] - inputs["pixel_values"]).abs().max().item()
    assert moved == pytest.approx(EPSILON / STD)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": None}, "adversarial training needs labels; received inputs pixel_values"),
        (
            {"labels": torch.zeros(4, 7, dtype=torch.long)},
            r"one class per sample.*received labels torch.int64 of shape \(4, 7\)",
        ),
        ({"labels": torch.zeros(4)}, r"one class per sample; received labels torch.float32"),
        ({"pixel_values": torch.rand(4, 1, 8, 8) * 9}, "values that mean pixels from"),
        ({"pixel_values": None}, "either pixel_values or input_ids; received inputs labels"),
        (
            {"input_ids": torch.ones(4, 3).long()},
            "either pixel_values or input_ids; received inputs pixel_values, labels",
        ),
    ],
)
def test_inputs_are_checked_before_the_ramp_rises(change, message, processor):
    inputs = {name: value for name, value in (batch_of(image_rows(4)) | change).items() if value is not None}
    with pytest.raises(AttackError, match=message), adversary(processor, **FGSM).batch(dense_vit(), inputs, progress=0):
        pass


@pytest.mark.parametrize(
    "given, message",
    [
        (None, "must know how pixels were normalised; received no image processor"),
        (object(), "must know how pixels were normalised; received object"),
        (ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3), "one of each for every channel; received 3"),
        (ViTImageProcessorPil(rescale_factor=1.0), "must scale 8-bit pixels"),
    ],
)
def test_training_without_a_known_normalisation_ends_at_once(given, message, tmp_path):
    args = arguments(tmp_path, **FGSM)
    model = convert(dense_vit())
    trainer = CondLRTrainer(model=model, args=args, train_dataset=image_rows(16), processing_class=given)
    before = copy.deepcopy(model)
    with pytest.raises(AttackError, match=message):
        trainer.train()
    assert_equal_weights(model, before)


def test_what_is_for_images_is_refused_for_texts():
    inputs = {**tokens(4), "labels": torch.tensor([0, 1, 1, 0])}
    for options in ({"adversarial_norm": "linf"}, {"adversarial_image_mean": [0.5], "adversarial_image_std": [0.5]}):
        refused = pytest.raises(AttackError, match="is for images and must be left alone for texts")
        with refused, adversary(**PGD_, **options).batch(dense_text(), inputs):
            pass


def test_no_attack_and_data_parallel_are_refused(processor):
    with pytest.raises(AttackError, match="adversarial training needs an attack"):
        AdversarialTraining(AdversarialArguments())
    wrapped = nn.DataParallel(dense_vit())
    refused = pytest.raises(AttackError, match="one process for each device; received a model in DataParallel")
    with refused, adversary(processor, **FGSM).batch(wrapped, batch_of(image_rows(4))):
        pass
