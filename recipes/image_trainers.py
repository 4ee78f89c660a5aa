"""The Trainer of each method of `image_classification.py`, all with augmentation, attacks in training, and restarts.

`CondLRTrainer` of the library does the rest for `condlr`. A dense model and one with free factors are trained on the
same adversarial samples here, so that methods compare.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Trainer

from hf_condlr import AdversarialTrainerMixin, CondLRTrainer, FactoredTrainer, FactoredTrainerMixin


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


class DenseTrainer(AugmentationMixin, AdversarialTrainerMixin, FactoredTrainerMixin, Trainer):
    """For a dense model."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._restore(resume_from_checkpoint, self.model if model is None else model)

    def _load_best_model(self) -> None:
        self._restore(self.state.best_model_checkpoint, self.model)

    def _restore(self, folder: str, model: nn.Module) -> None:
        """By `from_pretrained`: Trainer passes over weights whose names on disk are not the model's own (ViT's)."""
        model = self.accelerator.unwrap_model(model)
        model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


class LowRankTrainer(AugmentationMixin, AdversarialTrainerMixin, FactoredTrainer):
    """For factors that train freely."""


class ConditionedTrainer(AugmentationMixin, CondLRTrainer):
    """For factors with κ(S) ≤ 1 + τ."""


TRAINERS = {"dense": DenseTrainer, "lowrank": LowRankTrainer, "condlr": ConditionedTrainer}
