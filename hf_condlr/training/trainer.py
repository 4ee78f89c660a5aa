"""`CondLRTrainer`: transformers' Trainer with `CondLRCallback`, factored checkpoints and robust losses."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from hf_condlr.layers import factored_layers
from hf_condlr.manifold.step import ManifoldStep
from hf_condlr.training.callback import CondLRCallback, condition_records
from hf_condlr.training.factored import FactoredTrainerMixin
from hf_condlr.training.finite import FiniteGradientsCallback, require_finite
from hf_condlr.training.robust import RobustTrainerMixin

OVERRIDDEN = (
    # The mixins and classes of this package override these methods of Trainer, and no others. `compute_loss` is not
    # overridden but replaced on the instance, so that a `CombinedLoss` stands before that of any subclass.
    "_load_best_model",
    "_load_from_checkpoint",
    "_save_rng_state",
    "create_model_card",
    "evaluation_loop",
    "get_batch_samples",
    "get_decay_parameter_names",
    "log",
    "save_model",
    "train",
)


class CondLRTrainerMixin(RobustTrainerMixin, FactoredTrainerMixin):
    """Trains with `CondLRCallback` and `FiniteGradientsCallback`. Place it before a Trainer class.

    The arguments may be a `CondLRTrainingArguments`, or a plain `TrainingArguments` for the defaults. A
    `CondLRCallback` among the `callbacks` replaces the default one. With `projection_interval` > 1 the model is settled
    (`ManifoldStep.settle`) before each evaluation, prediction and saving and when training ends; logs in between are of
    a model outside of the constraint, and have no `kappa_bound`.

    Args:
        teacher: A dense model whose outputs the student also learns (`distillation_weight` > 0).
        robustness: Attacks that every `evaluate()` ends with, a `RobustnessArguments`.
    """

    model: Any
    state: Any
    control: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        kinds: tuple[type[TrainerCallback], ...] = (CondLRCallback, FiniteGradientsCallback)
        for kind in kinds:
            if not any(isinstance(callback, kind) for callback in self.callback_handler.callbacks):
                callback = kind()
                self.callback_handler.add_callback(callback)
                callback.on_init_end(self.args, self.state, self.control)

    @property
    def condlr_callback(self) -> CondLRCallback:
        """The callback that keeps the constraint."""
        return next(x for x in self.callback_handler.callbacks if isinstance(x, CondLRCallback))

    @property
    def manifold_step(self) -> ManifoldStep | None:
        """The handle of the present or the last training; None before the first one."""
        return self.condlr_callback.handle

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All except U and V, whose decay would be projected away. ‖S‖_F = ‖W‖_F, so S decays as W would."""
        bases = {f"{name}.{k}".lstrip(".") for name in factored_layers(model) for k in "UV"}
        return [name for name in super().get_decay_parameter_names(model) if name not in bases]  # type: ignore[misc]

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as Trainer does, a model that obeys the constraint."""
        self.condlr_callback.settle()
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save as Trainer does, a model that obeys the constraint and is finite."""
        self.condlr_callback.settle()
        require_finite(self.accelerator.unwrap_model(self.model), self.state.global_step)
        super().save_model(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with κ, its bound, the orthonormality error and the compression.

        The callback adds them too, but reporting integrations are called before it.
        """
        logs.update(condition_records(self.model, logs))
        super().log(logs, *args, **kwargs)


class FactoredTrainer(RobustTrainerMixin, FactoredTrainerMixin, Trainer):
    """`Trainer` for models whose weights train freely, dense ones or U, S, V, without the manifold step."""


class CondLRTrainer(CondLRTrainerMixin, Trainer):
    """`Trainer` with the manifold step; takes `CondLRTrainingArguments`."""


class CondLRSeq2SeqTrainer(CondLRTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with the manifold step; takes `CondLRSeq2SeqTrainingArguments`."""
