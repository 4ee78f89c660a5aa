"""Which checkpoint the same command goes on from, when it is given once more."""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from command_line import require
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from hf_condlr.files import replacing

logger = logging.getLogger(__name__)
SETTINGS = "settings.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Of the Trainer's options those that change what is trained; the others say how it is logged, saved and evaluated.
TRAINED = (
    *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("seed", "data_seed", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "label_smoothing_factor"),
    *("conditioning_warmup_ratio", "metric_scaling"),
    *("projection_interval", "distillation_weight", "distillation_temperature", "adversarial_attack"),
    *("adversarial_epsilon", "adversarial_norm", "adversarial_steps", "adversarial_share", "adversarial_schedule"),
    *("trades_beta", "mixed_precision"),
)


def checkpoint_to_resume(args: TrainingArguments, options: Mapping[str, Any]) -> str | None:
    """The folder to go on from, or None to start anew; then the settings are written down.

    `resume_from_checkpoint` is auto or not given: the last checkpoint in output_dir that was written whole, if there is
    one; true: there must be one; a folder: that one; false: none, and those in output_dir are removed.

    Args:
        args: Of the Trainer.
        options: Whatever else the training depends on.

    Raises:
        ValueError: The checkpoints in output_dir are of a training with other settings; or `true`, and there is none.
    """
    folder, asked = Path(args.output_dir), str(args.resume_from_checkpoint or "auto")
    settings = json.loads(json.dumps({**options, **{name: getattr(args, name, None) for name in TRAINED}}, default=str))
    found = None
    with args.main_process_first(desc="choice of a checkpoint"):  # the others look when the first has tidied up
        if asked.lower() == "false":
            _remove_checkpoints(folder)
        elif asked.lower() not in ("auto", "true"):
            found = asked
        else:
            found = _last(folder)
            rule = "resume_from_checkpoint true needs a whole checkpoint in output_dir"
            require(found or asked.lower() == "auto", rule, str(folder), "Start anew with auto, or name a folder.")
            _require_same(folder, settings, found)
        if args.process_index == 0:
            with replacing(folder / SETTINGS) as temporary:  # a process killed here leaves the old ones or the new
                temporary.write_text(json.dumps(settings, indent=1) + "\n")
    logger.warning("%s", f"going on from {found}" if found else f"no checkpoint in {folder}: training starts anew")
    return found


def steps_done(checkpoint: str | None) -> int:
    """Optimizer steps before the checkpoint."""
    return json.loads(Path(checkpoint, TRAINER_STATE_NAME).read_text())["global_step"] if checkpoint else 0


def _checkpoints(folder: Path) -> list[Path]:
    """Those that the Trainer wrote, by the number of steps; a copy under another name is the user's."""
    found = [path for path in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _last(folder: Path) -> str | None:
    """The checkpoint of the most steps that was written whole, the Trainer's state last, with its optimizer."""
    for path in reversed(_checkpoints(folder)):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            logger.warning("%s was not written whole and is passed over", path)
            continue
        if (path / "optimizer.pt").is_file():
            return str(path)
        logger.warning("%s holds no optimizer (save_only_model): nothing can go on from it", path)
    return None


def _require_same(folder: Path, settings: dict[str, Any], found: str | None) -> None:
    if found is None or not (folder / SETTINGS).is_file():
        return
    old = json.loads((folder / SETTINGS).read_text())
    changed = [f"{name} {old.get(name)!r} → {value!r}" for name, value in settings.items() if old.get(name) != value]
    remedy = "Choose another output_dir, or --resume_from_checkpoint false, which removes its checkpoints."
    require(not changed, f"the training in {folder} must go on with its own settings", ", ".join(changed), remedy)


def _remove_checkpoints(folder: Path) -> None:
    for path in _checkpoints(folder):
        logger.warning("training starts anew: %s is removed", path)
        shutil.rmtree(path)
