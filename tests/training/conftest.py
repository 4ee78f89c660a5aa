"""What several tests of the Trainer use."""

import pytest
from transformers import ViTImageProcessorPil

from tests.training.tiny_images import MEAN, STD


@pytest.fixture
def processor():
    return ViTImageProcessorPil(image_mean=[MEAN], image_std=[STD], size={"height": 8, "width": 8})
