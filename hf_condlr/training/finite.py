"""Steps whose gradients are not finite are left out, and parameters that are not finite are never saved."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_condlr.distributed.collectives import anywhere
from hf_condlr.distributed.shards import local
from hf_condlr.errors import OptimizerError, listed, require

logger = logging.getLogger(__name__)

PATIENCE = 50  # optimizer steps in a row
REMEDY = "Lower the learning rate, and resume from the last checkpoint with resume_from_checkpoint=True."


class FiniteGradientsCallback(TrainerCallback):
    """Leaves out optimizer steps whose gradients are not finite.

    The manifold step keeps NaN out of the factors; this keeps it out of biases, normalisation and heads too, which one
    NaN would spoil permanently: clipping by the norm of all gradients spreads it to every parameter. A step without
    gradients moves nothing and leaves the optimizer's state alone; the schedules continue. Under GradScaler (fp16),
    which does the same, nothing is done. The log has the number of such steps of this training as `steps_left_out`.

    Raises:
        OptimizerError: `PATIENCE` steps in a row were left out, or a checkpoint would have held parameters that are not
            finite: with `save_total_limit` it would have pushed out a good one.
    """

    def __init__(self) -> None:
        self.steps_left_out = 0
        self._in_a_row = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps_left_out = self._in_a_row = 0

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if not gradients or getattr(optimizer, "scaler", None) is not None:
            return
        own = [x for p in gradients.values() if (x := local(p)).numel()]  # a process may hold no rows of some
        largest = torch.nn.utils.get_total_norm(own, norm_type=math.inf)
        # Trainer waits for the device in every step anyway, for its own norm.
        if not anywhere(not torch.isfinite(largest), gradients.values()):
            self._in_a_row = 0
            return
        self.steps_left_out += 1
        self._in_a_row += 1
        step, names = state.global_step + 1, listed(not_finite(gradients))
        if self.steps_left_out == 1:
            logger.warning(
                f"step {step} is left out: gradients that are not finite in {names}. Later ones are counted in the log "
                "as steps_left_out; look at the samples of that batch, or lower the learning rate."
            )
        if self._in_a_row >= PATIENCE:
            broken = not_finite(dict(model.named_parameters()))
            raise OptimizerError(
                f"one of {PATIENCE} steps must have finite gradients",
                received=f"none up to step {step}, this time in {names}"
                + (f"; parameters that are not finite: {listed(broken)}" if broken else ""),
                remedy=REMEDY,
            )
        for p in model.parameters():
            p.grad = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if control.should_save:
            require_finite(model, state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.on_step_end(args, state, control, model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        kept = state.log_history[-1]
        if not math.isfinite(logs.get("grad_norm", 0.0)):  # strict JSON has no NaN
            del kept["grad_norm"]
        if self.steps_left_out:
            logs["steps_left_out"] = kept["steps_left_out"] = self.steps_left_out


def require_finite(model: nn.Module, step: int) -> None:
    """Refuse to save parameters that are not finite; of a sharded model every process must call it."""
    broken = not_finite(dict(model.named_parameters()))
    require(
        not anywhere(bool(broken), model.parameters()),
        "a checkpoint must hold finite parameters",
        received=f"NaN or inf in {listed(broken) or 'the rows of another process'} at step {step}",
        remedy=REMEDY,
        error=OptimizerError,
    )


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors with an entry, in this process's rows, that is NaN or inf."""
    return [name for name, x in tensors.items() if not torch.isfinite(local(x)).all()]
