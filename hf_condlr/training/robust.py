"""Additions to a Trainer for distillation, adversarial training, and attacks in its evaluations."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from hf_condlr.training.arguments import CondLRArguments, RobustnessArguments
from hf_condlr.training.losses import CombinedLoss
from hf_condlr.training.robust_evaluation import check_evaluation_data, robust_metrics


class RobustTrainerMixin:
    """Distillation and adversarial training as the arguments say, and attacks at the end of each `evaluate()`.

    Place it before a Trainer class. The metrics of the attacks (`robust_evaluation.robust_metrics`) have the prefix of
    the evaluation; `predict()` attacks nothing. A batch in parts (`gradient_accumulation_steps`) trains as one batch,
    whether or not the model's loss uses `num_items_in_batch`.

    Args:
        teacher: A dense model whose outputs the student also learns (`distillation_weight` > 0).
        robustness: The attacks; none without it.
    """

    args: Any

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
        self.compute_loss = self.combined_loss  # before that of any subclass
        self.robustness = robustness
        if robustness is not None:
            check_evaluation_data(self)

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
