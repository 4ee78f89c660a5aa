"""Steps whose gradients are not finite are left out, and parameters that are not finite are never saved."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from hf_condlr.distributed.collectives import anywhere
from hf_condlr.distributed.shards import local
from hf_condlr.errors import OptimizerError, listed

logger = logging.getLogger(__name__)


PATIENCE = 50  # optimizer steps in a row


class FiniteTrainingMixin:
    """To be put before a Trainer class.

    The manifold step keeps NaN out of the factors; this keeps it out of biases, normalisation and heads too, which one
    NaN would end for good: clipping by the norm of all gradients spreads it to every parameter, and Trainer's log shows
    nothing of it. A step without gradients moves nothing and leaves the optimizer's moments alone; the schedules go on.
    Under GradScaler (fp16), which does the same, nothing is done. Logs their number as `steps_left_out`.

    Raises:
        OptimizerError: `PATIENCE` steps in a row were left out, or a checkpoint would have held what is not finite:
            with `save_total_limit` it would have pushed out a good one.
    """

    model: Any
    accelerator: Any
    state: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._steps_left_out = self._in_a_row = 0

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's; after the last part of a batch gradients that are not finite are dropped, all of them."""
        loss = super().training_step(model, *args, **kwargs)  # type: ignore[misc]
        if self.accelerator.sync_gradients and self.accelerator.scaler is None:
            self._leave_out(model)
        return loss

    def _leave_out(self, model: nn.Module) -> None:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if not gradients:
            return
        own = [x for p in gradients.values() if (x := local(p)).numel()]  # a process may hold no rows of some
        largest = torch.nn.utils.get_total_norm(own, norm_type=float("inf"))
        # Trainer waits for the device in every step anyway, for its own norm.
        if not anywhere(not torch.isfinite(largest), gradients.values()):
            self._in_a_row = 0
            return
        self._steps_left_out += 1
        self._in_a_row += 1
        step, names = self.state.global_step + 1, _not_finite(gradients)
        if self._steps_left_out == 1:
            logger.warning(
                "step %d is left out: gradients that are not finite in %s. Later ones are counted in the log as "
                "steps_left_out; look at the samples of that batch, or lower the learning rate.",
                step,
                listed(names),
            )
        if self._in_a_row >= PATIENCE:
            raise OptimizerError(
                f"one of {PATIENCE} steps must have finite gradients",
                received=f"none up to step {step}, this time in {listed(names)}"
                + (f"; parameters that are not finite: {listed(bad)}" if (bad := self._broken_parameters()) else ""),
                remedy="Lower the learning rate, and go on from the last checkpoint with resume_from_checkpoint=True: "
                "it is whole.",
            )
        for p in model.parameters():
            p.grad = None

    def _broken_parameters(self) -> list[str]:
        return _not_finite(dict(self.accelerator.unwrap_model(self.model).named_parameters()))

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, of finite parameters."""
        broken = self._broken_parameters()
        if anywhere(bool(broken), self.model.parameters()):
            names = listed(broken) or "the rows of another process"
            raise OptimizerError(
                "a checkpoint must hold finite parameters",
                received=f"NaN or inf in {names} at step {self.state.global_step}",
                remedy="Lower the learning rate, and go on from the last checkpoint with resume_from_checkpoint=True.",
            )
        super().save_model(*args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds how many steps were left out so far."""
        if self._steps_left_out and "loss" in logs:
            logs["steps_left_out"] = self._steps_left_out
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def _not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of those with an entry, in this process's rows, that is NaN or inf."""
    return [name for name, x in tensors.items() if not torch.isfinite(local(x)).all()]
