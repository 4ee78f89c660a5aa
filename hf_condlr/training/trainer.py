"""`CondLRTrainer`: transformers' Trainer with the manifold step attached to whatever optimizer it makes."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer

from hf_condlr.errors import ConfigError, OptimizerError
from hf_condlr.files import replacing
from hf_condlr.layers import condition_report, factored_layers
from hf_condlr.manifold.step import ManifoldStep, attach_manifold_step
from hf_condlr.training.adversarial import AdversarialTrainerMixin
from hf_condlr.training.distillation import DistillationMixin
from hf_condlr.training.engines import check_engine
from hf_condlr.training.factored import FactoredTrainerMixin
from hf_condlr.training.finite_gradients import FiniteTrainingMixin
from hf_condlr.training.robust_evaluation import RobustEvaluationMixin

logger = logging.getLogger(__name__)


STATE_FILE = "manifold_step.json"


class CondLRTrainerMixin(
    FiniteTrainingMixin, AdversarialTrainerMixin, DistillationMixin, RobustEvaluationMixin, FactoredTrainerMixin
):
    """Attaches the manifold step, keeps U and V out of weight decay, logs κ, and saves where the schedule stands.

    To be put before a Trainer class. Gradient clipping (`max_grad_norm`) sees the gradients as backward left them,
    before their projection on the tangent space. Evaluations during the warm-up cannot become the best model: their κ
    is above 1 + τ. With `projection_interval` > 1 the model is settled (`ManifoldStep.settle`) before each evaluation,
    prediction and saving and when training ends; what is logged in between is of a model outside of the constraint, and
    has no `kappa_bound`. A step whose gradients are not finite is left out (`FiniteTrainingMixin`).

    Args:
        teacher: A dense model whose logits the student also learns (`distillation_weight` > 0).
        robustness: Attacks that every `evaluate()` ends with, a `RobustnessArguments`.
    """

    optimizer: Any
    manifold_step: ManifoldStep | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_engine(self.args, self.accelerator)

    # ---------------------------------------------------------------------------------------------- optimization

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All but U and V: their decay would be projected away. ‖S‖_F = ‖W‖_F, so S decays as W would."""
        bases = {f"{name}.{k}".lstrip(".") for name in factored_layers(model) for k in "UV"}
        return [name for name in super().get_decay_parameter_names(model) if name not in bases]  # type: ignore[misc]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, with its own groups for U, V and for S, and the manifold step attached."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)  # type: ignore[misc]
        if self.manifold_step is None or not given:  # a new optimizer, also where model_init made a new model
            self._split_groups(optimizer, given)
            if self.manifold_step is not None:
                self.manifold_step.remove()
            self.manifold_step = attach_manifold_step(
                optimizer,
                self.model if model is None else model,
                metric_scaling=self.args.metric_scaling,
                projection_interval=self.args.projection_interval,
                drift_check_interval=self.args.drift_check_interval,
            )
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's scheduler; the number of steps also says how long the conditioning warms up."""
        if self.manifold_step is not None and not self.manifold_step.step_count:  # a bound once reached stays
            self.manifold_step.schedule.warmup_steps = math.ceil(
                self.args.conditioning_warmup_ratio * num_training_steps
            )
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def _split_groups(self, optimizer: torch.optim.Optimizer, given: bool) -> None:
        multipliers: dict[int, float] = {}
        for layer in factored_layers(self.model).values():
            multipliers |= {id(p): self.args.factor_learning_rate for p in (layer.U, layer.V)}
            multipliers[id(layer.S)] = self.args.core_learning_rate
        if set(multipliers.values()) <= {1.0}:
            return
        if given:
            raise ConfigError(
                "factor_learning_rate and core_learning_rate apply to the optimizer that the Trainer makes",
                received="an optimizer of your own",
                remedy="Give the factors parameter groups of their own in it, and leave both at 1.",
            )
        for group in list(optimizer.param_groups):
            if group.get("lr") is None:
                raise OptimizerError(
                    "factor_learning_rate and core_learning_rate multiply the optimizer's learning rate",
                    received=f"{type(optimizer).__name__} with lr=None",
                    remedy="Leave both at 1, or give the optimizer a learning rate.",
                )
            for multiplier in sorted({multipliers.get(id(p), 1.0) for p in group["params"]} - {1.0}):
                parameters = [p for p in group["params"] if multipliers.get(id(p), 1.0) == multiplier]
                group["params"] = [p for p in group["params"] if multipliers.get(id(p), 1.0) != multiplier]
                settings = {key: value for key, value in group.items() if key != "params"}
                optimizer.add_param_group(settings | {"params": parameters, "lr": group["lr"] * multiplier})

    # ------------------------------------------------------------------------------------------------ settled models

    def _settle(self) -> None:
        if self.manifold_step is not None:
            self.manifold_step.settle()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, on a model that obeys the constraint."""
        self._settle()
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, of a model that obeys the constraint; checkpoints come by here before the optimizer's state."""
        self._settle()
        super().save_model(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._settle()  # also before the best model is loaded, which is not to be taken for a displacement
        return super()._finalize_training(*args, **kwargs)  # type: ignore[misc]

    # --------------------------------------------------------------------------------------------------- records

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds κ, its bound, the orthonormality error and the compression to each training and evaluation log.

        What the manifold step has to say, on a GPU it says here.
        """
        if self.manifold_step is not None:
            self.manifold_step.check()
        loss_key = next((key for key in logs if key == "loss" or key.endswith("_loss")), None)
        if loss_key is not None and factored_layers(self.model):
            report = condition_report(self.accelerator.unwrap_model(self.model))
            records = {
                "kappa_max": report.max_condition_number,
                "kappa_mean": report.mean_condition_number,
                "kappa_bound": max(layer.bound for layer in report.layers),
                "orthonormality_error": report.max_orthonormality_error,
                "compression": report.compression,
            }
            prefix = loss_key.removesuffix("loss")  # "eval_" among an evaluation's metrics
            # Infinite ones are left out: trainer_state.json is read by strict parsers.
            logs.update({prefix + key: value for key, value in records.items() if math.isfinite(value)})
        super().log(logs, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `FactoredTrainerMixin.train`; says so when it ends before the conditioning warm-up does."""
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        step = self.manifold_step
        if step is not None and step.step_count < step.schedule.warmup_steps:
            finite = [bound for bound in step.bounds().values() if math.isfinite(bound)]
            logger.warning(
                "training ended at step %d of a conditioning warm-up of %d: κ is bounded by %.4g, not yet by 1 + tau",
                step.step_count,
                step.schedule.warmup_steps,
                max(finite, default=math.inf),
            )
        return output

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        step = self.manifold_step
        if step is not None and any(step.bounds()[name] > 1 + layer.tau for name, layer in step.layers.items()):
            return False
        return super()._determine_best_metric(metrics, trial)  # type: ignore[misc]

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save and self.manifold_step is not None:
            with replacing(Path(output_dir, STATE_FILE)) as temporary:
                temporary.write_text(json.dumps(self.manifold_step.state_dict(), indent=1))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None or self.manifold_step is None:
            return
        path = Path(checkpoint, STATE_FILE)
        if not path.is_file():
            raise OptimizerError(
                "a checkpoint to resume from must hold the state of the conditioning schedule",
                received=f"no {STATE_FILE} in {checkpoint}",
                remedy="Resume from one that this trainer wrote without save_only_model, or start anew.",
            )
        self.manifold_step.load_state_dict(json.loads(path.read_text()))


class CondLRTrainer(CondLRTrainerMixin, Trainer):
    """`Trainer` with the manifold step; takes `CondLRTrainingArguments`."""


class CondLRSeq2SeqTrainer(CondLRTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with the manifold step; takes `CondLRSeq2SeqTrainingArguments`."""
