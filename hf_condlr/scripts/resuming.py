"""`checkpoint_to_resume`: a script that was killed resumes when the same command is given again."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_condlr.checkpoints.restore import checkpoints_in, last_complete_checkpoint
from hf_condlr.errors import CheckpointError, require
from hf_condlr.files import replacing

logger = logging.getLogger(__name__)
SETTINGS = "settings.json"
TRAINED = (
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("seed", "data_seed", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "label_smoothing_factor"),
    *("conditioning_warmup_ratio", "metric_scaling", "projection_interval", "distillation_weight"),
    *("distillation_temperature", "adversarial_attack", "adversarial_epsilon", "adversarial_norm", "adversarial_steps"),
    *("adversarial_share", "adversarial_schedule", "trades_beta", "mixed_precision", "world_size"),
    "save_only_model",
)
"""The Trainer's options that change what is trained or can be resumed; the others only log, save and evaluate."""


def checkpoint_to_resume(args: TrainingArguments, *settings: Any) -> str | None:
    """The checkpoint to resume from, or None; and write all settings to `settings.json`.

    With `resume_from_checkpoint` not given or `auto`: the last complete checkpoint in `output_dir`, if there is one;
    `true`: there must be one; a folder: that one; `false`: none, and those in `output_dir` are removed.

    Args:
        args: Arguments of the Trainer.
        settings: Dataclasses of everything else that the training depends on.

    Raises:
        CheckpointError: The checkpoints in `output_dir` are of a training with other settings; or there is none.

    Examples:
        >>> trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_args, model_args, data_args))
    """
    folder, asked = Path(str(args.output_dir)), str(args.resume_from_checkpoint or "auto")
    stated: dict[str, Any] = {name: value for part in settings for name, value in vars(part).items()}
    stated |= {name: getattr(args, name, None) for name in TRAINED}
    stated = json.loads(json.dumps(stated, default=str))
    found = None
    with args.main_process_first(desc="choice of a checkpoint"):  # the others look when the first has tidied up
        if asked.lower() == "false":
            for path in checkpoints_in(folder):
                logger.warning("training starts from the beginning: %s is removed", path)
                shutil.rmtree(path)
        elif asked.lower() not in ("auto", "true"):
            found = asked
        elif not args.save_only_model:  # else there is no optimizer to resume from
            try:
                found = last_complete_checkpoint(str(folder))
                _require_same(folder, stated)
            except CheckpointError:
                if found or asked.lower() == "true":
                    raise
        if args.process_index == 0:
            with replacing(folder / SETTINGS) as temporary:
                temporary.write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")
    none = f"no checkpoint in {folder}: training starts from the beginning"
    logger.warning("%s", f"resuming from {found}" if found else none)
    return found


def _require_same(folder: Path, stated: dict[str, Any]) -> None:
    path = folder / SETTINGS
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else stated
    changed = [f"{name} {old.get(name)!r} → {value!r}" for name, value in stated.items() if old.get(name) != value]
    rule = f"the training in {folder} must be resumed with its own settings"
    remedy = "Choose another output_dir, or --resume_from_checkpoint false, which removes its checkpoints."
    require(not changed, rule, received=", ".join(changed), remedy=remedy, error=CheckpointError)
