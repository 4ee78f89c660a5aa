"""Additions to a Trainer for the checkpoints and the model cards of factored models."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_condlr.checkpoints.card import write_model_card
from hf_condlr.checkpoints.restore import last_complete_checkpoint, restore_weights
from hf_condlr.distributed.shards import is_sharded
from hf_condlr.layers import converted_layers
from hf_condlr.training.best_model import has_own_files, restore_best_model
from hf_condlr.training.callback import FactoredPushCallback
from hf_condlr.training.peft_factors import load_factors, save_factors
from hf_condlr.training.robust_evaluation import card_attacks, card_metrics, last_evaluation

logger = logging.getLogger(__name__)


class FactoredTrainerMixin:
    """Complete checkpoints of factored models, whether or not their constraint is kept.

    Place it before a Trainer class, of this or another library: `class FactoredSFTTrainer(FactoredTrainerMixin,
    SFTTrainer)`. Trainer itself looks for dense weights: it could not resume, and would load no best model. A model
    that loads itself (a `PeftModel`, a `SentenceTransformer`) is left to the Trainer; factors that train inside a
    `PeftModel`, which saves only its adapter, are saved next to it.
    """

    args: Any
    model: Any
    accelerator: Any
    state: Any
    callback_handler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not any(isinstance(callback, FactoredPushCallback) for callback in self.callback_handler.callbacks):
            self.callback_handler.add_callback(FactoredPushCallback())
        reference = getattr(self, "ref_model", None)  # of TRL's DPOTrainer, for example
        if isinstance(reference, nn.Module) and converted_layers(self.model) and not converted_layers(reference):
            logger.warning(
                "the reference model is dense, and the trained one is factored: without ref_model it is loaded from "
                "the checkpoint that the model came from. Give ref_model=copy.deepcopy(model) for one like it."
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer.train` does; with True, resume from the last complete checkpoint."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return no further batch after `max_steps`: a training that is resumed from its last step is over."""
        if self.state.global_step >= self.state.max_steps > 0:
            return [], None
        return super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save as Trainer does.

        `last_complete_checkpoint` looks for the Trainer's state, which is written last. The state of an earlier
        training under the same name is deleted before anything is overwritten.
        """
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]
        if self.args.should_save:
            save_factors(self.accelerator.unwrap_model(self.model), folder)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()  # before the first process writes the Trainer's state

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any) -> None:
        bare = self.accelerator.unwrap_model(args[0] if args else self.model)
        if has_own_files(bare):
            restore_weights(bare, resume_from_checkpoint)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, *args)  # type: ignore[misc]
        load_factors(bare, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        bare = self.accelerator.unwrap_model(self.model)
        if has_own_files(bare):
            restore_best_model(bare, self.state)
            return
        super()._load_best_model()  # type: ignore[misc]
        load_factors(bare, self.state.best_model_checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of `write_model_card`; what the user wrote in it stays.

        It uses Trainer's arguments `finetuned_from`, `dataset` and `tags`, and `metrics`, `split` and `robustness` of
        `write_model_card`, by default those of the last evaluation.
        """
        model = self.accelerator.unwrap_model(self.model)
        if is_sharded(model):  # the card is made by one process, which does not have the weights
            logger.warning("no model card of a sharded model: save it, and call write_model_card(model, folder) after")
            return
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return
        if not converted_layers(model):
            known = {name: value for name, value in kwargs.items() if name not in ("metrics", "split", "robustness")}
            super().create_model_card(*args, **known)  # type: ignore[misc]
            return
        dataset, tags = kwargs.get("dataset"), kwargs.get("tags") or []
        evaluation, robustness = last_evaluation(self), getattr(self, "robustness", None)
        write_model_card(
            model,
            self.args.output_dir,
            base_model=kwargs.get("finetuned_from"),
            metrics=kwargs.get("metrics") or card_metrics(evaluation, robustness),
            split=kwargs.get("split"),
            robustness=kwargs.get("robustness", card_attacks(evaluation, robustness)),
            dataset=dataset if isinstance(dataset, str) or not dataset else dataset[0],
            model_id=getattr(self, "hub_model_id", None),
            tags=[tags] if isinstance(tags, str) else tags,
        )
