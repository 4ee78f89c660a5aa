"""`PixelModel`: normalisation becomes part of the attacked model, so that ε is measured in pixels of [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from hf_condlr.robustness.attacks.base import logits_of, require


class PixelModel(nn.Module):
    """(B, C, H, W) pixels in [0, 1] ↦ float32 logits of `model((pixels − mean)/std)`.

    Args:
        model: Returns a tensor of logits, or a transformers output that has `.logits`.
        mean: Mean of the normalisation, a number or one for each channel.
        std: Standard deviation of the normalisation, a number or one for each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, mean: float | Sequence[float] = 0.0, std: float | Sequence[float] = 1.0
    ) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)

    @classmethod
    def from_processor(cls, model: nn.Module, processor: Any) -> Self:
        """A `PixelModel` with the mean and the standard deviation of an image processor of transformers.

        Raises:
            AttackError: The processor is not for images, or it does not scale 8-bit pixels to [0, 1] and normalise them
                once, so that ε would have no unit.
        """
        rule, kind = "an image processor must say how pixels are normalised", type(processor).__name__
        remedy = "Give AutoImageProcessor.from_pretrained(...), or build PixelModel(model, mean, std)."
        require(hasattr(processor, "do_normalize"), rule, kind, remedy)
        received = f"{kind} with include_top=True, which divides by the std twice"
        remedy = "Build PixelModel(model, mean, std) with what takes pixels of [0, 1] to what the model was trained on."
        twice = getattr(processor, "include_top", False)
        require(not twice, "an image processor must normalise pixels once", received, remedy)
        scale = getattr(processor, "rescale_factor", 1 / 255) if getattr(processor, "do_rescale", True) else 1.0
        shifted = getattr(processor, "rescale_offset", None)
        rule = "the image processor must scale 8-bit pixels to [0, 1] before it normalises them"
        received = f"rescale_factor={scale:g}" + (f", rescale_offset={shifted}" if shifted else "")
        require(abs(scale * 255 - 1) < 1e-6 and not shifted, rule, received, remedy)
        if not processor.do_normalize:
            return cls(model)
        return cls(model, processor.image_mean, processor.image_std)

    def forward(self, pixels: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        """Logits of the normalised pixels in float32, for a model of any dtype."""
        parameter = next(self.model.parameters(), pixels)
        return logits_of(self.model(self.normalize(pixels).to(parameter.dtype)))

    def normalize(self, pixels: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        """(x − mean)/std, in float32."""
        return (pixels.float() - self.mean.to(pixels.device)) / self.std.to(pixels.device)

    def denormalize(self, values: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        """Pixels of [0, 1] from normalised values; excesses below 1e-4, from rounding, are cut off.

        Raises:
            AttackError: The values are not pixels normalised with this mean and standard deviation.
        """
        pixels = values.float() * self.std.to(values.device) + self.mean.to(values.device)
        low, high = pixels.min().item(), pixels.max().item()
        rule = "normalised images must be pixels of [0, 1] less the mean over the standard deviation"
        remedy = "Give the mean and std, or the image processor, that these images were made with."
        received = f"values that mean pixels from {low:.4g} to {high:.4g}"
        require(low > -1e-4 and high < 1 + 1e-4, rule, received, remedy)
        return pixels.clamp(0, 1)
