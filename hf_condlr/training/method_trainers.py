"""`trainer_class`: the Trainer of each method, with adversarial training and exact restarts."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer

from hf_condlr.training.trainer import CondLRTrainer, FactoredTrainer


class DenseTrainer(FactoredTrainer):
    """For dense models, on the same adversarial samples as the other methods."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any) -> None:
        self._restore(resume_from_checkpoint, args[0] if args else self.model)

    def _load_best_model(self) -> None:
        self._restore(self.state.best_model_checkpoint, self.model)

    def _restore(self, folder: str, model: nn.Module) -> None:
        """By `from_pretrained`: Trainer passes over weights whose names on disk are not the model's own (ViT's)."""
        bare: Any = self.accelerator.unwrap_model(model)
        bare.load_state_dict(type(bare).from_pretrained(folder, dtype=bare.dtype).state_dict())


def trainer_class(method: str) -> type[Trainer]:
    """The Trainer of a method.

    Args:
        method: `dense`, `lowrank` (U, S, V without a constraint) or `condlr` (κ(S) ≤ 1 + τ).
    """
    trainers: dict[str, Any] = {"dense": DenseTrainer, "lowrank": FactoredTrainer, "condlr": CondLRTrainer}
    return trainers[method]
