"""Whether a loss is normalised over the accumulated batch, measured on a real one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def follows_item_count(
    compute_loss: Callable[..., Tensor], model: nn.Module, inputs: Mapping[str, Any], num_items: Tensor | int
) -> bool | None:
    """Whether a loss changes with `num_items_in_batch`.

    Many of transformers' models ignore the number. Trainer assumes that they divide by it, and trains with the sum of
    the parts' losses in place of their mean (huggingface/transformers#47688).

    Args:
        compute_loss: `Trainer.compute_loss`.
        model: Evaluated twice in evaluation mode; training flags and random states stay as they were.
        inputs: A prepared batch.
        num_items: The number of items in the accumulated batch.

    Returns:
        None if this batch cannot tell, since its loss is 0 or not finite.
    """
    training = [module for module in model.modules() if module.training]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    model.eval()
    try:
        losses = []
        for number in (num_items, 2 * num_items):
            with torch.random.fork_rng(devices):  # a model may draw random numbers even in evaluation mode
                losses.append(float(compute_loss(model, dict(inputs), num_items_in_batch=number).mean()))
    finally:
        for module in training:
            module.training = True
    first, second = losses
    if not 0 < abs(first) < float("inf"):
        return None
    return abs(first - second) > 1e-3 * abs(first)
