"""`CondLRCallback`: the manifold step inside any Trainer that is built on transformers' `Trainer`."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_condlr.checkpoints.manifest import STEM
from hf_condlr.distributed.shards import local
from hf_condlr.errors import CondLRError, OptimizerError, require
from hf_condlr.layers import LowRankUpdate, condition_report, converted_layers, factored_layers
from hf_condlr.linalg import is_orthonormal, obeys_bound
from hf_condlr.manifold.step import ManifoldStep, attach_manifold_step
from hf_condlr.training.arguments import CondLRArguments, check_evaluation_dtype
from hf_condlr.training.best_model import WarmUpVeto, restore_best_model
from hf_condlr.training.engines import check_engine

logger = logging.getLogger(__name__)


class FactoredPushCallback(TrainerCallback):
    """Puts factored weights among the files that Trainer uploads with a checkpoint.

    Trainer copies the files whose names it knows from the checkpoint to `output_dir`, and uploads that folder.
    """

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        for path in folder.glob(f"{STEM}*"):
            shutil.copy(path, args.output_dir)


class CondLRCallback(FactoredPushCallback, ExportableState):
    """Keeps U, V orthonormal and κ(S) ≤ 1 + τ after every optimizer step of a Trainer.

    When training begins, the manifold step is attached to the optimizer that the Trainer uses, wherever that optimizer
    was created; when training ends, it is detached. In between the callback

    - stops the training if factors move in an optimizer step that did not run the manifold step;
    - settles the model (`ManifoldStep.settle`) before evaluations and checkpoints;
    - adds κ, its bound, the orthonormality error and the compression to the logs of training and evaluation;
    - keeps models of the warm-up, and all whose κ is above 1 + τ, from becoming the best model;
    - stores the conditioning schedule in `trainer_state.json`, and continues from there when training is resumed.

    A setting that is None has the value in the Trainer's arguments, or the default if they are no `CondLRArguments`.

    Args:
        warmup_ratio: Share of the training over which the bound on κ falls to 1 + τ, in [0, 1]; 0.3 by default.
        metric_scaling, projection_interval, drift_check_interval: See `attach_manifold_step`.

    Attributes:
        handle: The `ManifoldStep` of the present or the last training; None before the first one.

    Examples:
        >>> trainer = SFTTrainer(model=model, args=SFTConfig("out"), train_dataset=data, callbacks=[CondLRCallback()])
    """

    def __init__(
        self,
        warmup_ratio: float | None = None,
        *,
        metric_scaling: bool | None = None,
        projection_interval: int | None = None,
        drift_check_interval: int | None = None,
    ) -> None:
        self.settings: dict[str, Any] = {
            "conditioning_warmup_ratio": warmup_ratio,
            "metric_scaling": metric_scaling,
            "projection_interval": projection_interval,
            "drift_check_interval": drift_check_interval,
        }
        CondLRArguments(**{name: value for name, value in self.settings.items() if value is not None})  # validates
        self.handle: ManifoldStep | None = None
        self.schedule: dict[str, Any] | None = None  # set when transformers restores the callback
        self._attached = False
        self._veto = WarmUpVeto()
        self._before_step: tuple[int, list[Tensor]] = (0, [])

    # ------------------------------------------------------------------------------------------ begin and end

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_evaluation_dtype(args)
        check_engine(args)
        for layer in factored_layers(model).values() if isinstance(model, nn.Module) else ():
            if isinstance(layer, LowRankUpdate) and layer.S.dtype in (torch.bfloat16, torch.float16):
                layer.float()  # TRL rounds the adapters of quantized models; the step brings the bases back

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        self.on_init_end(args, state, control)  # the callback may have been added later
        previous, schedule = self.handle, None
        if self._attached:  # an exception ended the last training
            self._detach()
        settings = {name: self._setting(args, name) for name in self.settings}
        warmup_steps = math.ceil(settings.pop("conditioning_warmup_ratio") * state.max_steps)
        handle = attach_manifold_step(optimizer, model, warmup_steps=warmup_steps, **settings)
        if state.global_step:
            schedule = self._stored_schedule(state)
        elif previous is not None and [*previous.layers.values()] == [*handle.layers.values()] and previous.step_count:
            schedule = previous.state_dict()  # the same model trains on: a bound once reached stays
        if schedule is not None:
            try:
                handle.load_state_dict(schedule)
            except BaseException:
                handle.remove()
                raise
        self.handle, self._attached = handle, True

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._veto.lift()
        handle = self._handle()
        if handle is None:
            return
        self._detach()
        if args.load_best_model_at_end:
            restore_best_model(model, state)
        warmup_steps = handle.state_dict()["warmup_steps"]
        if handle.step_count < warmup_steps:
            logger.warning(
                "training ended at step %d of a conditioning warm-up of %d: κ is not yet bounded by 1 + tau",
                handle.step_count,
                warmup_steps,
            )

    def _handle(self) -> ManifoldStep | None:
        """The handle while it is attached."""
        return self.handle if self._attached else None

    def _setting(self, args: Any, name: str) -> Any:
        given = self.settings[name]
        return getattr(args, name, getattr(CondLRArguments, name)) if given is None else given

    def _stored_schedule(self, state: Any) -> dict[str, Any]:
        """The state of the manifold step in the checkpoint that training is resumed from."""
        stored = state.stateful_callbacks.get(type(self).__name__)
        schedule = stored.get("attributes", {}).get("schedule") if isinstance(stored, dict) else None
        require(
            isinstance(schedule, dict),
            "a checkpoint to resume from must hold the state of the conditioning schedule",
            received=f"none of {type(self).__name__} in its trainer_state.json",
            remedy="Resume from a checkpoint of a Trainer with this callback, or start from the beginning.",
            error=OptimizerError,
        )
        return schedule  # type: ignore[return-value]

    def settle(self) -> None:
        """Bring the model back to the constraint, while a training is on; see `ManifoldStep.settle`."""
        if handle := self._handle():
            handle.settle()

    def _detach(self) -> None:
        """Settle the model and detach the step."""
        if self.handle is not None:
            self.handle.remove()
        self._attached = False

    def state(self) -> dict[str, Any]:
        """State that transformers writes into `trainer_state.json`."""
        self._veto.lift()
        try:
            schedule = None if self.handle is None else self.handle.state_dict()
        except CondLRError:  # between two projections; `on_save` warns of it
            schedule = None
        args = dict(self.settings)
        return {
            "args": {"warmup_ratio": args.pop("conditioning_warmup_ratio")} | args,
            "attributes": {"schedule": schedule},
        }

    # -------------------------------------------------------------------------------------------------- steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._veto.lift()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if handle := self._handle():
            self._before_step = (handle.step_count, _norms(handle))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        handle = self._handle()
        if handle is None or handle.step_count != self._before_step[0]:
            return
        # A step that a gradient scaler skips moves nothing.
        moved = any(not torch.equal(x, y) for x, y in zip(self._before_step[1], _norms(handle), strict=True))
        name = type(getattr(optimizer, "optimizer", optimizer)).__name__
        require(
            not moved,
            "an optimizer step that moves factors must run the hooks of the manifold step",
            received=f"step {state.global_step + 1} of {name}, which ran none of them",
            remedy="Give the Trainer the optimizer whose step() moves the parameters, not a copy of it or a wrapper.",
            error=OptimizerError,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate or control.should_save:
            self.settle()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._veto.lift()
        self.on_step_end(args, state, control)

    # ------------------------------------------------------------------------------- evaluations and checkpoints

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        handle = self._handle()
        if handle is None:
            return
        handle.state_dict()  # raises between two projections
        in_warm_up = any(handle.bounds()[name] > 1 + layer.tau for name, layer in handle.layers.items())
        if in_warm_up or not obeys_constraint(model):
            self._veto.remember(state)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._veto.lift()
        if handle := self._handle():
            handle.state_dict()  # raises between two projections

    def on_log(self, args: Any, state: Any, control: Any, model: Any = None, logs: Any = None, **kwargs: Any) -> None:
        self._veto.lift()
        if handle := self._handle():
            handle.check()
            if "train_runtime" in logs:  # the next thing may be to load the best model
                handle.settle()
        records = condition_records(model, logs)
        logs.update(records)
        if state.log_history:
            state.log_history[-1].update(records)


def condition_records(model: nn.Module, logs: dict[str, Any]) -> dict[str, float]:
    """κ, its bound, the orthonormality error and the compression, with the prefix of the loss in the Trainer's logs.

    Nothing without a loss, without factored layers, or if the logs have them already.
    """
    loss_key = next((key for key in logs if key == "loss" or key.endswith("_loss")), None)
    if loss_key is None or not factored_layers(model):
        return {}
    prefix = loss_key.removesuffix("loss")
    if f"{prefix}kappa_max" in logs:
        return {}
    report = condition_report(extract_model_from_parallel(model, keep_torch_compile=False))
    records = {
        "kappa_max": report.max_condition_number,
        "kappa_mean": report.mean_condition_number,
        "kappa_bound": max(layer.bound for layer in report.layers),
        "orthonormality_error": report.max_orthonormality_error,
    }
    if converted_layers(model):
        records["compression"] = report.compression
    # Infinite ones are left out: trainer_state.json is read by strict parsers.
    return {prefix + key: value for key, value in records.items() if math.isfinite(value)}


def obeys_constraint(model: nn.Module) -> bool:
    """Whether the weights, as other code may have written them after the last step, obey κ(S) ≤ 1 + τ."""
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    layers = factored_layers(bare)
    return all(
        obeys_bound(x.condition_number, 1 + layers[x.name].tau) and is_orthonormal(x.orthonormality_error, x.r)
        for x in condition_report(bare).layers
    )


def _norms(handle: ManifoldStep) -> list[Tensor]:
    """The norm of each factor, which differs after a step that moved it; takes 1 % of the time of a manifold step."""
    factors = [local(getattr(layer, kind)).detach() for layer in handle.layers.values() for kind in "USV"]
    return list(torch._foreach_norm(factors))
