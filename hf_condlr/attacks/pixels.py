"""`PixelModel`: normalisation becomes part of the attacked model, so that ε is measured in pixels of [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class PixelModel(nn.Module):
    """(B, C, H, W) pixels in [0, 1] ↦ float32 logits of `model((pixels − mean)/std)`.

    Args:
        model: Returns a tensor of logits, or a transformers output that has `.logits`.
        mean: A number, or one per channel.
        std: A number, or one per channel.
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

    def forward(self, pixels: Tensor) -> Tensor:  # (B, C, H, W) -> (B, classes)
        """Logits of the normalised pixels, in float32 whatever the model's dtype."""
        parameter = next(self.model.parameters(), pixels)
        normalised = (pixels.float() - self.mean.to(pixels.device)) / self.std.to(pixels.device)
        output = self.model(normalised.to(parameter.dtype))
        return (output if isinstance(output, Tensor) else output.logits).float()
