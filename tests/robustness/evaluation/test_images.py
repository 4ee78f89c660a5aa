"""Images of every depth and mode are attacked as what they show, or refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_condlr.errors import EvaluationError
from hf_condlr.robustness.evaluation.rows import as_8_bit
from hf_condlr.robustness.evaluation.samples import Samples
from tests import classifiers
from tests.robustness.evaluation.evaluation import evaluate

GREY = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(GREY),
        Image.fromarray(GREY.astype(np.uint16) * 257),
        Image.fromarray(np.stack([GREY] * 3, 2)),
        Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (8, 8), 255)]),
    ],
    ids=lambda picture: picture.mode,
)
@pytest.mark.parametrize("channels", [1, 3, None])
def test_images_of_8_and_16_bits_keep_their_grey(picture, channels):
    values = np.asarray(as_8_bit(picture, channels))
    assert values.dtype == np.uint8
    assert (values == (GREY if values.ndim == 2 else GREY[..., None])).all()
    assert values.ndim == (3 if channels == 3 or (channels is None and picture.mode in ("RGB", "LA")) else 2)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_images_whose_range_is_unknown_are_refused(dtype):
    picture = Image.fromarray((GREY / 255).astype(dtype))
    with pytest.raises(EvaluationError, match=rf"8 or 16 bits a channel.*; received .*mode {picture.mode}\."):
        evaluate(classifiers.mlp(), [(picture, 0)] * 4, processor=classifiers.processor())


def test_images_of_16_bits_are_attacked_as_those_of_8_bits():
    deep = [
        (Image.fromarray(np.asarray(row["image"]).astype(np.uint16) * 257), row["label"])
        for row in classifiers.images(40)
    ]
    samples = Samples(classifiers.mlp(), deep, processor=classifiers.processor())
    assert torch.equal(samples.batch(range(40))[0], classifiers.held_out(40)[0])
