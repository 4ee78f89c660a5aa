"""The Kullback-Leibler divergence of two models' class probabilities, as distillation and TRADES train with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kl_divergence(logits: Tensor, target_logits: Tensor) -> Tensor:  # (*, classes), (*, classes) -> (*)
    """KL(softmax(target) ‖ softmax(z)) of each sample or token, in at least float32; both sides have gradients."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_q, log_p = (F.log_softmax(z.to(wide), dim=-1) for z in (logits, target_logits))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
