"""`CondLRTrainer`: transformers' Trainer with the manifold step attached to whatever optimizer it makes.

The logic is a mixin, so that `Seq2SeqTrainer` and trainers of other libraries get it too:
`class CondLRSFTTrainer(CondLRTrainerMixin, SFTTrainer)`.
"""

from __future__ import annotations

import inspect
import json
import logging
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Seq2SeqTrainer, Trainer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.trainer_utils import HubStrategy

from hf_condlr.checkpoints import STEM
from hf_condlr.diagnostics import condition_report
from hf_condlr.errors import ConfigError, OptimizerError
from hf_condlr.layers import factored_layers
from hf_condlr.manifold import ManifoldStep, attach_manifold_step
from hf_condlr.model_card import write_model_card
from hf_condlr.restoring import last_whole_checkpoint, restore_weights

logger = logging.getLogger(__name__)
STATE_FILE = "manifold_step.json"


class FactoredTrainerMixin:
    """What a Trainer needs for the checkpoints of factored models, whether or not their constraint is kept.

    To be put before a Trainer class. Trainer itself looks for dense weights: it could neither resume nor load the best
    model, and would only warn.
    """

    args: Any
    model: Any
    accelerator: Any
    state: Any

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; with True it goes on from the last checkpoint that was written whole."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer copies the files it knows the names of to `output_dir` and uploads that: the weights go there too."""
        if self.args.should_save and self.args.hub_strategy != HubStrategy.END:
            for path in Path(checkpoint_folder).glob(f"{STEM}*"):
                shutil.copy(path, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card of `write_model_card`, with this model's last evaluation; what the user wrote in it stays.

        Of Trainer's arguments `finetuned_from`, `dataset` and `tags` go into it, and `robustness` as `write_model_card`
        takes it. What else a card may say stands in its header, which is the user's.
        """
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        model = self.accelerator.unwrap_model(self.model)
        if not factored_layers(model):
            super().create_model_card(*args, **kwargs)  # type: ignore[misc]
            return
        dataset = kwargs.get("dataset")
        write_model_card(
            model,
            self.args.output_dir,
            base_model=kwargs.get("finetuned_from"),
            metrics=self._metrics(),
            robustness=kwargs.get("robustness", ()),
            dataset=dataset if isinstance(dataset, str) or not dataset else dataset[0],
            model_id=getattr(self, "hub_model_id", None),
            tags=[tags] if isinstance(tags := kwargs.get("tags") or [], str) else tags,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        restore_weights(self.accelerator.unwrap_model(self.model if model is None else model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        logger.info("loading the best model from %s", self.state.best_model_checkpoint)
        restore_weights(self.accelerator.unwrap_model(self.model), self.state.best_model_checkpoint)

    def _metrics(self) -> dict[str, Any]:
        """Of the model as it is: of evaluations after the training, or of the best model's where that was loaded."""
        history = self.state.log_history
        ended = max((i for i, entry in enumerate(history) if "train_runtime" in entry), default=-1)
        after, during = history[ended + 1 :], history[: ended + 1]
        if self.args.load_best_model_at_end and self.state.best_global_step:
            during = [entry for entry in during if entry.get("step") == self.state.best_global_step]
        for entry in reversed([*during, *after]):
            found = {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
            if found:
                return {name: value for name, value in found.items() if not _NOT_MEASURED.search(name)}
        return {}


class CondLRTrainerMixin(FactoredTrainerMixin):
    """Attaches the manifold step, keeps U and V out of weight decay, logs κ, and saves where the schedule stands.

    To be put before a Trainer class. Gradient clipping (`max_grad_norm`) sees the gradients as backward left them,
    before their projection on the tangent space. Evaluations during the warm-up cannot become the best model: their κ
    is above 1 + τ.

    Args:
        teacher: A dense model whose logits the student also learns (`distillation_weight` > 0).
    """

    optimizer: Any
    model_accepts_loss_kwargs: bool
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    manifold_step: ManifoldStep | None = None

    def __init__(self, *args: Any, teacher: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise OptimizerError(
                "factors must be whole parameters on each device",
                received="FSDP" if self.is_fsdp_enabled else "DeepSpeed",
                remedy="Use DDP (torchrun or accelerate launch without them).",
            )
        self.model_accepts_loss_kwargs &= _normalises_by_items(self.accelerator.unwrap_model(self.model))
        weight = self.args.distillation_weight
        if (teacher is not None) != (weight > 0):
            raise ConfigError(
                "a teacher and distillation_weight > 0 belong together",
                received=f"{'no teacher' if teacher is None else 'a teacher'}, distillation_weight={weight}",
                remedy="CondLRTrainer(..., teacher=dense_model) with distillation_weight=0.5, say; or neither.",
            )
        self.teacher = teacher.to(self.args.device).eval() if teacher is not None else None

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
                optimizer, self.model if model is None else model, metric_scaling=self.args.metric_scaling
            )
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's scheduler; the number of steps also says how long the conditioning warms up."""
        if self.manifold_step is not None and not self.manifold_step.step_count:  # a bound once reached stays
            self.manifold_step.warmup_steps = math.ceil(self.args.conditioning_warmup_ratio * num_training_steps)
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

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """(1 − λ) loss + λ T² KL(softmax(z_teacher/T) ‖ softmax(z/T)) in training; the plain loss in evaluation."""
        plain = super().compute_loss  # type: ignore[misc]
        if self.teacher is None or not model.training:
            return plain(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        labels, mask = inputs.get("labels"), inputs.get("attention_mask")
        teacher_inputs = {key: value for key, value in inputs.items() if key != "labels"}
        loss, outputs = plain(model, inputs, True, num_items_in_batch=num_items_in_batch)
        with torch.no_grad():
            target = self.teacher(**teacher_inputs).logits
        logits = outputs["logits"]
        if labels is not None and labels.shape == target.shape[:-1]:
            if type(self.accelerator.unwrap_model(model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
                logits, target, labels = logits[:, :-1], target[:, :-1], labels[:, 1:]  # position t predicts t + 1
            mask = labels != -100
        term = distillation_loss(logits, target, self.args.distillation_temperature, mask)
        if num_items_in_batch is not None and self.model_accepts_loss_kwargs and labels is not None:
            # The loss is this part's share of the mean over the whole accumulated batch: so must the term be.
            term = term * (labels != -100).sum() / num_items_in_batch
            if self.args.average_tokens_across_devices:
                term = term * self.accelerator.num_processes
        loss = (1 - self.args.distillation_weight) * loss + self.args.distillation_weight * term
        return (loss, outputs) if return_outputs else loss

    # --------------------------------------------------------------------------------------------------- records

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds κ, its bound, the orthonormality error and the compression to each training and evaluation log."""
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
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `FactoredTrainerMixin.train`; says so when it ends before the conditioning warm-up does."""
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        step = self.manifold_step
        if step is not None and step.step_count < step.warmup_steps:
            finite = [bound for bound in step.bounds().values() if math.isfinite(bound)]
            logger.warning(
                "training ended at step %d of a conditioning warm-up of %d: κ is bounded by %.4g, not yet by 1 + tau",
                step.step_count,
                step.warmup_steps,
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
            temporary = Path(output_dir, STATE_FILE + ".tmp")
            temporary.write_text(json.dumps(self.manifold_step.state_dict(), indent=1))
            os.replace(temporary, Path(output_dir, STATE_FILE))

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


# What an evaluation logs beside its metrics: speed, and what the card takes from the model itself.
_NOT_MEASURED = re.compile(r"runtime|_per_second$|^kappa_|^orthonormality_error$|^compression$|_preparation_time$")


class FactoredTrainer(FactoredTrainerMixin, Trainer):
    """`Trainer` for factored models whose U, S, V train freely, without the manifold step."""


class CondLRTrainer(CondLRTrainerMixin, Trainer):
    """`Trainer` with the manifold step; takes `CondLRTrainingArguments`."""


class CondLRSeq2SeqTrainer(CondLRTrainerMixin, Seq2SeqTrainer):
    """`Seq2SeqTrainer` with the manifold step; takes `CondLRSeq2SeqTrainingArguments`."""


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float, mask: Tensor | None = None
) -> Tensor:  # (*, classes), (*, classes), (*) -> ()
    """T² KL(softmax(z_t/T) ‖ softmax(z/T)), mean over samples or tokens that a mask of their shape leaves.

    Source: Hinton, Vinyals, Dean 2015, section 2.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_q, log_p = (F.log_softmax(z.to(wide) / temperature, dim=-1) for z in (logits, teacher_logits))
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if mask is not None and mask.shape == divergence.shape:
        divergence = divergence[mask.bool()]
    return temperature**2 * divergence.mean()


def _normalises_by_items(model: nn.Module) -> bool:
    """Whether the model's loss uses `num_items_in_batch`, rather than only swallowing it in **kwargs.

    BERT's classification head among others drops it. Trainer then neither divides the loss by the accumulation steps
    nor does the model, and 4 × 8 trains with four times the loss of 32 (huggingface/transformers#47688).
    """
    code = inspect.unwrap(type(model).forward).__code__
    return bool({"loss_function", "num_items_in_batch"} & {*code.co_names, *code.co_varnames})
