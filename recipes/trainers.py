"""The Trainer of each method, with attacks in training and restarts.

`CondLRTrainer` of the library does the rest for `condlr`. A dense model and one with free factors are trained on the
same adversarial samples here, so that methods compare.
"""

from torch import nn
from transformers import Trainer

from hf_condlr import CondLRTrainer, FactoredTrainer


class DenseTrainer(FactoredTrainer):
    """For a dense model."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._restore(resume_from_checkpoint, self.model if model is None else model)

    def _load_best_model(self) -> None:
        self._restore(self.state.best_model_checkpoint, self.model)

    def _restore(self, folder: str, model: nn.Module) -> None:
        """By `from_pretrained`: Trainer passes over weights whose names on disk are not the model's own (ViT's)."""
        model = self.accelerator.unwrap_model(model)
        model.load_state_dict(type(model).from_pretrained(folder, dtype=model.dtype).state_dict())


TRAINERS: dict[str, type[Trainer]] = {"dense": DenseTrainer, "lowrank": FactoredTrainer, "condlr": CondLRTrainer}
"""{method: its Trainer}; `condlr` keeps κ(S) ≤ 1 + τ."""
