"""What a Trainer needs for the checkpoints and the model cards of factored models."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from hf_condlr.checkpoints.card import write_model_card
from hf_condlr.checkpoints.manifest import STEM
from hf_condlr.checkpoints.restore import last_whole_checkpoint, restore_weights
from hf_condlr.distributed.rows import is_sharded
from hf_condlr.layers import factored_layers

logger = logging.getLogger(__name__)


# What an evaluation logs beside its metrics: speed, and what the card takes from the model itself.
_NOT_MEASURED = re.compile(r"runtime|_per_second$|^kappa_|^orthonormality_error$|^compression$|_preparation_time$")


class WholeCheckpointsMixin:
    """To be put before a Trainer class. `hf_condlr.checkpoints.restore.last_whole_checkpoint` goes by that file.

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


class FactoredTrainerMixin(WholeCheckpointsMixin):
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

        Of Trainer's arguments `finetuned_from`, `dataset` and `tags` go into it, and `metrics`, `split` and
        `robustness` as `write_model_card` takes them. What else a card may say stands in its header, which is the
        user's.
        """
        model = self.accelerator.unwrap_model(self.model)
        if is_sharded(model):  # the card is made by one process, which does not have the weights
            logger.warning("no model card of a sharded model: save it, and call write_model_card(model, folder) after")
            return
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        if not factored_layers(model):
            known = {name: value for name, value in kwargs.items() if name not in ("metrics", "split", "robustness")}
            super().create_model_card(*args, **known)  # type: ignore[misc]
            return
        dataset = kwargs.get("dataset")
        write_model_card(
            model,
            self.args.output_dir,
            base_model=kwargs.get("finetuned_from"),
            metrics=kwargs.get("metrics") or self._metrics(),
            split=kwargs.get("split"),
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
        """What the card says of the last evaluation."""
        return {name: value for name, value in self._last_evaluation().items() if not _NOT_MEASURED.search(name)}

    def _last_evaluation(self) -> dict[str, Any]:
        """Of the model as it is: of evaluations after the training, or of the best model's where that was loaded."""
        history = self.state.log_history
        ended = max((i for i, entry in enumerate(history) if "train_runtime" in entry), default=-1)
        after, during = history[ended + 1 :], history[: ended + 1]
        if self.args.load_best_model_at_end and self.state.best_global_step:
            during = [entry for entry in during if entry.get("step") == self.state.best_global_step]
        for entry in reversed([*during, *after]):
            found = {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
            if found:
                return found
        return {}


class FactoredTrainer(FactoredTrainerMixin, Trainer):
    """`Trainer` for factored models whose U, S, V train freely, without the manifold step."""
