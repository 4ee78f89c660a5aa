"""`checkpoint_to_resume`: a script that was killed goes on when the same command is given again."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_condlr.checkpoints.restore import checkpoints_in, complete_checkpoints
from hf_condlr.errors import CheckpointError, require
from hf_condlr.files import replacing

logger = logging.getLogger(__name__)
SETTINGS = "settings.json"
OPTIMIZERS = ("optimizer.pt", "optimizer.bin")  # the second under FSDP
TRAINED = (
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("seed", "data_seed", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "label_smoothing_factor"),
    *("conditioning_warmup_ratio", "metric_scaling", "projection_interval", "distillation_weight"),
    *("distillation_temperature", "adversarial_attack", "adversarial_epsilon", "adversarial_norm", "adversarial_steps"),
    *("adversarial_share", "adversarial_schedule", "trades_beta", "mixed_precision", "world_size"),
)
"""The Trainer's options that change what is trained; the others say how it is logged, saved and evaluated."""


def checkpoint_to_resume(args: TrainingArguments, *settings: Any) -> str | None:
    """The checkpoint to go on from, or None to start anew; then the settings are written to `settings.json`.

    With `resume_from_checkpoint` not given or `auto`: the last complete checkpoint in `output_dir`, if there is one;
    `true`: there must be one; a folder: that one; `false`: none, and those in `output_dir` are removed.

    Args:
        args: The Trainer's.
        settings: Dataclasses of everything else that the training depends on.

    Raises:
        CheckpointError: The checkpoints in `output_dir` are of a training with other settings; or there is none.

    Example:
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
                logger.warning("training starts anew: %s is removed", path)
                shutil.rmtree(path)
        elif asked.lower() not in ("auto", "true"):
            found = asked
        else:
            found = _last(folder)
            rule, remedy = "resume_from_checkpoint true needs a complete checkpoint in output_dir", "Leave it out."
            required = found or asked.lower() == "auto"
            require(required, rule, received=str(folder), remedy=remedy, error=CheckpointError)
            if found:
                _require_same(folder, stated)
        if args.process_index == 0:
            with replacing(folder / SETTINGS) as temporary:
                temporary.write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")
    logger.warning("%s", f"going on from {found}" if found else f"no checkpoint in {folder}: training starts anew")
    return found


def _last(folder: Path) -> str | None:
    """The checkpoint of the most steps that is complete and has an optimizer."""
    for path in complete_checkpoints(folder):
        if any((path / name).exists() for name in OPTIMIZERS):
            return str(path)
        logger.warning("%s holds no optimizer (save_only_model): nothing can go on from it", path)
    return None


def _require_same(folder: Path, stated: Mapping[str, Any]) -> None:
    if not (folder / SETTINGS).is_file():
        return
    old = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    changed = [f"{name} {old.get(name)!r} → {value!r}" for name, value in stated.items() if old.get(name) != value]
    rule = f"the training in {folder} must go on with its own settings"
    remedy = "Choose another output_dir, or --resume_from_checkpoint false, which removes its checkpoints."
    require(not changed, rule, received=", ".join(changed), remedy=remedy, error=CheckpointError)
