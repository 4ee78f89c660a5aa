"""Model, tokenizer and Trainer of `language_modeling.py`."""

import math
from dataclasses import dataclass, field
from typing import Any

import text_model
import trainers
from command_line import require
from datasets import Dataset
from fresh_tokenizer import train_tokenizer, vocabulary
from language_data import BLOCK_SIZE, pack
from method import dense_start, factored
from text_model import require_same_tokens
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction, PreTrainedModel, default_data_collator
from transformers.trainer_utils import EvalLoopOutput


@dataclass
class ModelArguments(text_model.ModelArguments):
    """The model, its tokenizer, and what becomes of its linear layers."""

    calibration_samples: int = field(default=256, metadata={"help": "Training blocks for activation_aware and fisher."})

    def small(self) -> tuple[str, str]:
        """Type and config of the model where none is named."""
        return "gpt2", "{n_embd: 128, n_layer: 2, n_head: 4, n_positions: 128}"


def build_tokenizer(args: ModelArguments, train: Dataset) -> Any:
    """The model's own; for a fresh model one of the training texts."""
    if args.model_name_or_path is None:
        return train_tokenizer(train["text"], args.vocabulary_size, framed=False)
    return AutoTokenizer.from_pretrained(args.model_name_or_path)


def build_model(
    args: ModelArguments, train: Dataset, tokenizer: Any, block_size: int | None
) -> tuple[PreTrainedModel, int]:
    """The dense start, for the low-rank methods with its layers factored, and the tokens of a block.

    Embeddings that are also the output layer stay dense, tied, and saved once.

    Raises:
        ValueError: Tokens that the model does not know, or blocks longer than it takes.
    """
    fresh = vocabulary(tokenizer, args.fresh_config()) if args.model_type else {}
    model = dense_start(AutoModelForCausalLM, args, fresh)
    rows = model.get_input_embeddings().num_embeddings
    remedy = "Take the tokenizer of this model."
    require(len(tokenizer) <= rows, f"tokens must lie in the model's vocabulary of {rows}", len(tokenizer), remedy)
    most = positions(model)
    rule = f"block_size must be ≤ {most}, the model's positions"
    require(block_size is None or most is None or block_size <= most, rule, block_size, "Leave it out to use them all.")
    size = block_size or min(most or BLOCK_SIZE, BLOCK_SIZE)

    def calibration() -> DataLoader:
        blocks = pack(train, tokenizer, size, "train")
        blocks = blocks.shuffle(seed=0).select(range(min(args.calibration_samples, len(blocks))))
        return DataLoader(blocks, batch_size=8, collate_fn=default_data_collator)

    return factored(model, args, calibration), size


def positions(model: PreTrainedModel) -> int | None:
    """Most tokens that the model takes; None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def build_teacher(args: ModelArguments, tokenizer: Any) -> PreTrainedModel | None:
    """The dense model to distil from, of the same tokens."""
    if args.teacher is None:
        return None
    require_same_tokens(args.teacher, tokenizer)
    return AutoModelForCausalLM.from_pretrained(args.teacher)


class PerplexityMixin:
    """Perplexity exp(loss) of each evaluation, every block once. To be put before a Trainer class.

    Trainer's own mean counts blocks twice that fill up the last batch of several processes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, compute_metrics=self.perplexity, **kwargs)

    @staticmethod
    def perplexity(prediction: EvalPrediction) -> dict[str, float]:
        """Of the losses of blocks, all of as many tokens."""
        return {"perplexity": math.exp(min(float(prediction.predictions.mean()), 700.0))}  # more is no float

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """Trainer's, with the loss of each block in the place of logits, which would fill the memory."""
        step = super().prediction_step  # type: ignore[misc]
        loss, logits, labels = step(model, inputs, False, *args, **kwargs)
        targets = labels[:, 1:]  # position t predicts t + 1
        losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none")
        return loss, losses.reshape(targets.shape).mean(1), labels[:, 0]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Trainer's, with the loss that belongs to the perplexity."""
        loop = super().evaluation_loop  # type: ignore[misc]
        output = loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_loss"] = math.log(output.metrics[f"{metric_key_prefix}_perplexity"])
        return output


TRAINERS = {
    method: type(f"Language{trainer.__name__}", (PerplexityMixin, trainer), {})
    for method, trainer in trainers.TRAINERS.items()
}
"""{method: its Trainer, with perplexities}."""
