"""What an optimizer remembers of a factor whose update was not finite: it would hold that factor for ever."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hf_condlr.shards import local


@torch.no_grad()
def forget_broken_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Set entries of their state that are NaN or inf to 0: a moment that begins anew. Others stay as they are.

    Gradients that are not finite never reach the optimizer; but its own arithmetic can overflow, as Adafactor's does
    when it divides gradients that span 30 decades by factored second moments.
    """
    for p in parameters:
        for value in optimizer.state.get(p, {}).values():
            if isinstance(value, Tensor) and value.is_floating_point():
                local(value).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
