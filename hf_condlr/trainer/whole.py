"""What makes the Trainer's state file, written last, a sign that a checkpoint is whole, for every process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class WholeCheckpointsMixin:
    """To be put before a Trainer class. `hf_condlr.restoring.last_whole_checkpoint` goes by that file.

    A checkpoint that an earlier training left under the same name has it already: it is taken away before anything is
    overwritten. And each process writes its own random state: the first one waits for all of them before it writes it.
    """

    args: Any
    accelerator: Any
    state: Any

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")  # type: ignore[attr-defined]
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()
