"""The Trainer of each method of `image_classification.py`: those of `trainers.py`, with augmentation."""

from typing import Any

import torch
import trainers
from torch import Tensor, nn
from torch.nn.functional import pad


class AugmentationMixin:
    """Mirrors and shifts the images of each training batch, on its device. To be put before a Trainer class.

    What is drawn depends on the seed, the optimizer step, the part of its accumulated batch, and the process, so that
    a training that was killed and goes on draws what an uninterrupted one would have drawn.

    Args:
        flip: Mirror an image with probability ½.
        padding: Shift an image by up to so many pixels, edges repeated.
    """

    args: Any
    state: Any
    accelerator: Any

    def __init__(self, *args: Any, flip: bool = False, padding: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flip, self.padding = flip, padding
        self._drawn = (-1, 0)  # optimizer step, and how many batches it has had

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's, on augmented images."""
        step = self.state.global_step
        part = self._drawn[1] + 1 if self._drawn[0] == step else 0
        self._drawn = (step, part)
        words = (self.args.seed, step, part, self.accelerator.process_index)
        generator = torch.Generator().manual_seed(hash(words))  # of whole numbers: the same in every run
        augmented = augment(inputs["pixel_values"], generator, self.flip, self.padding)
        return super().training_step(model, inputs | {"pixel_values": augmented}, *args, **kwargs)  # type: ignore[misc]


def augment(pixels: Tensor, generator: torch.Generator, flip: bool, padding: int) -> Tensor:  # (N, c, h, w), the same
    """Mirrored with probability ½ and shifted by up to `padding` pixels, each image by itself."""
    if flip:
        mirrored = torch.rand(len(pixels), 1, 1, 1, generator=generator) < 0.5
        pixels = torch.where(mirrored.to(pixels.device), pixels.flip(-1), pixels)
    if not padding:
        return pixels
    height, width = pixels.shape[-2:]
    padded = pad(pixels, [padding] * 4, mode="replicate")
    corners = torch.randint(0, 2 * padding + 1, (len(pixels), 2), generator=generator).tolist()
    return torch.stack([x[:, i : i + height, j : j + width] for x, (i, j) in zip(padded, corners, strict=True)])


TRAINERS = {
    method: type(f"Augmenting{trainer.__name__}", (AugmentationMixin, trainer), {})
    for method, trainer in trainers.TRAINERS.items()
}
"""{method: its Trainer, on augmented images}."""
