"""`Corruption`: common, not adversarial, changes of an image in five severities, with torch and Pillow only.

A subset of the kinds of Hendrycks and Dietterich (2019, arXiv 1903.12261), with its own code and strengths:
accuracies under them are *not* those on CIFAR-10-C or ImageNet-C. Strengths are similar to those of the two sets, or
lie between them. The radii of blurs are in pixels for images whose shorter side is at most 32, and grow in proportion
above; all other strengths are the same at every size.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor, nn

from hf_condlr.robustness.attacks.base import Attack, at_least_float32, require, require_choice, require_images


@dataclass(frozen=True)
class Corruption(Attack):
    """A corruption of images (B, C, H, W) in [0, 1] with one or three channels.

    It is not an adversary: it ignores model and labels, and changes every sample, including misclassified ones, which
    it may correct. Its accuracy is that on all corrupted images, as is usual.

    The noise of an image depends on the image and `seed` alone, not on its batch, so that one severity is one fixed
    corrupted data set. `reseeded` therefore changes nothing.

    Args:
        kind: One of `KINDS`.
        epsilon: Severity: 1, 2, 3, 4 or 5; 0 leaves the images as they are.
        seed: Seed of the noise.
    """

    adversarial: ClassVar[bool] = False

    kind: str
    epsilon: float
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, tuple(KINDS))
        require(self.epsilon in range(6), "severity must be a whole number from 0 to 5", self.epsilon, "Choose one.")

    @property
    def name(self) -> str:
        return self.kind

    @property
    def threat(self) -> str:
        return f"corruption-{self.kind}"  # none is a worst case of another

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Corrupted images (B, C, H, W) in [0, 1], in at least float32."""
        require_images(inputs)
        channels = inputs.shape[1]
        require(channels in (1, 3), "images must have one or three channels", channels, "Corrupt the original pixels.")
        images = at_least_float32(inputs)
        if self.epsilon == 0:
            return images.clone()
        corrupt, strengths = KINDS[self.kind]
        strength = strengths[int(self.epsilon) - 1]
        corrupted = [  # one by one on the CPU, for the same result on every device and in every batch
            corrupt(image, strength, Generator().manual_seed(zlib.crc32(image.numpy().tobytes(), self.seed)))
            for image in images.float().cpu().contiguous()
        ]
        return torch.stack(corrupted).clamp(0, 1).to(images)

    def reseeded(self, index: int) -> Self:
        return self  # noise does not depend on the batch


def gaussian_noise(x: Tensor, deviation: float, generator: Generator) -> Tensor:
    """x + deviation·N(0, 1)."""
    return x + deviation * torch.randn(x.shape, generator=generator)


def shot_noise(x: Tensor, photons: float, generator: Generator) -> Tensor:
    """Poisson(photons·x)/photons."""
    return torch.poisson(photons * x, generator=generator) / photons


def impulse_noise(x: Tensor, share: float, generator: Generator) -> Tensor:
    """A share of all values becomes 0 or 1."""
    draws = torch.rand(x.shape, generator=generator)
    return torch.where(draws < share / 2, 0.0, torch.where(draws > 1 - share / 2, 1.0, x))


def gaussian_blur(x: Tensor, sigma: float, generator: Generator) -> Tensor:
    """Convolved with exp(−d²/2σ²), d the distance in pixels, cut off at 3σ in each direction."""
    sigma *= enlargement(x)
    weights = torch.exp(-offsets(3 * sigma).square() / (2 * sigma**2))
    return convolve(convolve(x, weights[:, None]), weights[None])


def defocus_blur(x: Tensor, radius: float, generator: Generator) -> Tensor:
    """Convolved with a disk; a border pixel counts by the share that the disk covers."""
    radius *= enlargement(x)
    distance = torch.hypot(offsets(radius)[:, None], offsets(radius))
    return convolve(x, (radius + 0.5 - distance).clamp(0, 1))


def brightness(x: Tensor, shift: float, generator: Generator) -> Tensor:
    """HSV's value, the largest channel, raised by shift to at most 1; hue and saturation stay."""
    value = x.amax(0, keepdim=True)
    raised = (value + shift).clamp_max(1)
    return torch.where(value > 0, x * (raised / value.clamp_min(1e-12)), raised)


def contrast(x: Tensor, factor: float, generator: Generator) -> Tensor:
    """Mean + factor·(x − mean) of each channel."""
    mean = x.mean((1, 2), keepdim=True)
    return mean + factor * (x - mean)


def pixelate(x: Tensor, share: float, generator: Generator) -> Tensor:
    """Each side averaged down to a share of its pixels, and stretched back."""
    height, width = x.shape[1:]
    small = (max(1, round(share * width)), max(1, round(share * height)))  # Pillow's order
    box = Image.Resampling.BOX  # each pixel in one block; those of torch's "area" overlap
    channels = [Image.fromarray(channel.numpy()).resize(small, box).resize((width, height), box) for channel in x]
    return torch.stack([torch.from_numpy(np.array(channel)) for channel in channels])


def jpeg(x: Tensor, quality: float, generator: Generator) -> Tensor:
    """8-bit pixels, written by Pillow with this quality and read again."""
    pixels = (255 * x).round().byte().movedim(0, 2).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if len(x) == 1 else pixels).save(file, "JPEG", quality=int(quality))
    read = torch.from_numpy(np.array(Image.open(file)))
    return read.reshape(pixels.shape).movedim(2, 0) / 255


# The function of each kind, and its parameter at each severity.
KINDS: dict[str, tuple[Callable[[Tensor, float, Generator], Tensor], tuple[float, float, float, float, float]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.07, 0.11, 0.17, 0.25)),
    "shot_noise": (shot_noise, (200, 75, 30, 14, 7)),
    "impulse_noise": (impulse_noise, (0.01, 0.03, 0.06, 0.11, 0.18)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.55, 0.7, 0.85, 1.0)),
    "defocus_blur": (defocus_blur, (0.6, 0.8, 1.0, 1.25, 1.5)),
    "brightness": (brightness, (0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (contrast, (0.75, 0.55, 0.4, 0.25, 0.15)),
    "pixelate": (pixelate, (0.9, 0.75, 0.6, 0.45, 0.3)),
    "jpeg": (jpeg, (60, 40, 25, 15, 8)),
}


def enlargement(x: Tensor) -> float:
    """Factor of radii for images larger than 32 pixels."""
    return max(1.0, min(x.shape[1:]) / 32)


def offsets(radius: float) -> Tensor:  # -> (2k + 1,), k = ⌊radius⌋ + 1
    """−k, ..., k: the pixels that a disk of this radius around the middle one touches."""
    reach = int(radius) + 1
    return torch.arange(-reach, reach + 1).float()


def convolve(x: Tensor, kernel: Tensor) -> Tensor:  # (C, H, W), (2j + 1, 2k + 1) -> (C, H, W)
    """Each channel averaged with the kernel as weights; border pixels are repeated outwards."""
    down, across = (side // 2 for side in kernel.shape)
    padded = F.pad(x[:, None], [across, across, down, down], mode="replicate")
    return F.conv2d(padded, (kernel / kernel.sum())[None, None])[:, 0]
