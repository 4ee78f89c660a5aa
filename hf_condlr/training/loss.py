"""The training loss, to which mixins add terms that come to the same whether a batch comes at once or in parts."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def kl_divergence(logits: Tensor, target_logits: Tensor) -> Tensor:  # (*, classes), (*, classes) -> (*)
    """KL(softmax(target) ‖ softmax(z)) of each sample or token, in at least float32; both sides have gradients."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_q, log_p = (F.log_softmax(z.to(wide), dim=-1) for z in (logits, target_logits))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


class TrainingLossMixin:
    """Tells the loss that is trained from the one that is evaluated, which stays plain. Goes before a Trainer class."""

    args: Any
    model: Any
    accelerator: Any
    compute_loss_func: Any
    model_accepts_loss_kwargs: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs &= _normalises_by_items(self.accelerator.unwrap_model(self.model))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """`training_loss` of a model in training mode, else the plain loss."""
        if not model.training:
            plain = super().compute_loss  # type: ignore[misc]
            return plain(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        loss, outputs = self.training_loss(model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Any]:
        """Loss and outputs; what mixins extend."""
        return super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch)  # type: ignore[misc]

    def share_of_accumulated(self, labels: Tensor | None, num_items_in_batch: Tensor | int | None) -> Tensor | float:
        """What a mean over this batch counts in the mean over the accumulated one, where the loss is such a share.

        1 where the loss is a mean of its own, which Trainer divides by the number of parts.
        """
        is_share = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if num_items_in_batch is None or labels is None or not is_share:
            return 1.0
        share = (labels != -100).sum() / num_items_in_batch
        return share * self.accelerator.num_processes if self.args.average_tokens_across_devices else share


def _normalises_by_items(model: nn.Module) -> bool:
    """Whether the model's loss uses `num_items_in_batch`, rather than only swallowing it in **kwargs.

    BERT's classification head among others drops it. Trainer then neither divides the loss by the accumulation steps
    nor does the model, and 4 × 8 trains with four times the loss of 32 (huggingface/transformers#47688).
    """
    code = inspect.unwrap(type(model).forward).__code__
    return bool({"loss_function", "num_items_in_batch"} & {*code.co_names, *code.co_varnames})
