"""What a Trainer needs for distillation, adversarial training, and attacks in its evaluations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from hf_condlr.training.accumulation import follows_item_count
from hf_condlr.training.arguments import CondLRArguments, RobustnessArguments
from hf_condlr.training.losses import CombinedLoss
from hf_condlr.training.robust_evaluation import check_evaluation_data, robust_metrics


class RobustTrainerMixin:
    """Distillation and adversarial training as the arguments say, and attacks at the end of each `evaluate()`.

    To be put before a Trainer class. The metrics of the attacks (`robust_evaluation.robust_metrics`) stand behind the
    prefix of the evaluation; `predict()` attacks nothing. A batch that comes in parts (`gradient_accumulation_steps`)
    trains as one that comes at once, whether or not the model's loss takes notice of `num_items_in_batch`.

    Args:
        teacher: A dense model whose outputs the student also learns (`distillation_weight` > 0).
        robustness: The attacks; none without it.
    """

    args: Any
    accelerator: Any
    loss_is_scaled_for_ga: bool | None

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | None = None,
        robustness: RobustnessArguments | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        arguments = self.args if isinstance(self.args, CondLRArguments) else CondLRArguments()
        self.combined_loss = CombinedLoss(self, arguments, teacher)
        if self.combined_loss.has_terms:
            self.compute_loss = self.combined_loss  # before that of any subclass
        self.robustness = robustness
        if robustness is not None:
            check_evaluation_data(self)
        self.loss_follows_item_count: bool | None = None  # not measured yet

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Take Trainer's step; a loss that drops `num_items_in_batch` counts as the mean over its part."""
        if num_items_in_batch is not None and self._drops_item_count(model, inputs, num_items_in_batch):
            num_items_in_batch = None
        return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]

    def _drops_item_count(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int) -> bool:
        parts = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        is_stated = getattr(self, "loss_is_scaled_for_ga", None) is not None
        if self.loss_follows_item_count is None and parts > 1 and not is_stated:
            batch = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
            follows = follows_item_count(self.compute_loss, model, batch, num_items)
            found = torch.tensor([-1 if follows is None else int(follows)], device=self.args.device)
            best = self.accelerator.gather(found).max().item()
            if best >= 0:
                self.loss_follows_item_count = best > 0
            if best == 0:
                self.loss_is_scaled_for_ga = False
        return self.loss_follows_item_count is False

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with the radius and the error of the adversarial training."""
        if "loss" in logs:
            logs.update(self.combined_loss.records())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Evaluate as Trainer does, and attack."""
        loop = super().evaluation_loop  # type: ignore[misc]
        output = loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.robustness is not None and description == "Evaluation":  # predict() says "Prediction"
            measured = robust_metrics(self, dataloader.dataset, self.robustness)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return output
