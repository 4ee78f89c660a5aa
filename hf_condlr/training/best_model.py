"""The best model of a training: never one of the warm-up, and restored with its factors."""

from __future__ import annotations

import logging
from typing import Any

from accelerate.utils import extract_model_from_parallel
from torch import nn
from transformers import PreTrainedModel

from hf_condlr.checkpoints.restore import restore_weights
from hf_condlr.layers import converted_layers

logger = logging.getLogger(__name__)


def has_own_files(model: nn.Module) -> bool:
    """Whether Trainer's own way of loading would miss the factors of a model in a checkpoint.

    A transformers model stores them under other names, and a plain module has no loader. A `PeftModel` or a
    `SentenceTransformer` loads what it saved itself.
    """
    is_self_loading = hasattr(model, "save_pretrained") and not isinstance(model, PreTrainedModel)
    return bool(converted_layers(model)) and not is_self_loading


def restore_best_model(model: nn.Module, state: Any) -> None:
    """Load the weights of `state.best_model_checkpoint`, if there is one, into a factored model."""
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    if state.best_model_checkpoint is not None and has_own_files(bare):
        logger.info("loading the best model from %s", state.best_model_checkpoint)
        restore_weights(bare, state.best_model_checkpoint)


class WarmUpVeto:
    """Takes back that an evaluation during the warm-up made its model the best one.

    Trainer decides after the callbacks of an evaluation, and offers none afterwards: what was the best before is
    remembered, and restored at the next event, or before the state is written.
    """

    NAMES = ("best_metric", "best_global_step", "best_model_checkpoint")

    def __init__(self) -> None:
        self._remembered: tuple[Any, dict[str, Any]] | None = None

    def remember(self, state: Any) -> None:
        """The best model of a `TrainerState` so far."""
        self._remembered = (state, {name: getattr(state, name) for name in self.NAMES})

    def lift(self) -> None:
        """Restore what was remembered, if anything."""
        if self._remembered is not None:
            state, values = self._remembered
            self._remembered = None
            for name, value in values.items():
                setattr(state, name, value)
