"""Pillow images as an image processor takes them: 8 bits, one or three channels."""

from __future__ import annotations

import numpy as np
import PIL.Image
from PIL.Image import Image

from hf_condlr.errors import EvaluationError, require

EIGHT_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "HSV", "LAB")


def as_8_bit(image: Image, channels: int | None) -> Image:
    """The image in 8 bits with one or three channels: those of the model, or (None) grey for grey images, else RGB.

    Pillow's own conversion cuts 16-bit values off at 255 and integer parts off floats: 16 bits are divided by 257 here.

    Raises:
        EvaluationError: The range of the image's values is not known: 32-bit integers or floats.
    """
    if image.mode.startswith("I;16"):
        image = PIL.Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    require(
        image.mode in EIGHT_BIT,
        "images must have 8 or 16 bits a channel, whose range is known",
        received=f"an image of Pillow's mode {image.mode}",
        remedy="Scale its values to 0 to 255 first: PIL.Image.fromarray(values.astype('uint8')).",
        error=EvaluationError,
    )
    mode = {1: "L", 3: "RGB"}.get(channels or 0, "L" if image.mode in ("L", "1") else "RGB")
    return image.convert(mode)
