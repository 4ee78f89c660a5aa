"""Model and tokenizer of `text_classification.py`: pretrained or fresh, encoder or decoder, dense or factored."""

import inspect
from dataclasses import dataclass, field
from typing import Any

from command_line import require
from datasets import Dataset
from fresh_tokenizer import train_tokenizer, vocabulary
from method import MethodArguments, class_names, dense_start, factored, require_same_classes
from text_data import encode
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, PreTrainedModel

from hf_condlr.robustness.attacks import TextModel


@dataclass
class ModelArguments(MethodArguments):
    """The model, its tokenizer, and what becomes of its linear layers."""

    vocabulary_size: int = field(
        default=4000, metadata={"help": "Tokens of a fresh model, whose tokenizer is trained on the training texts."}
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path is None and self.model_type is None:
            self.model_type, overrides = self.small()
            self.config_overrides = self.config_overrides or overrides
        super().__post_init__()
        require(
            self.vocabulary_size >= 300, "vocabulary_size must be ≥ 300, of which 260 are bytes", self.vocabulary_size
        )

    def small(self) -> tuple[str, str]:
        """Type and config of the model where none is named."""
        sizes = "hidden_size: 128, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 512"
        return "bert", f"{{{sizes}, max_position_embeddings: 128}}"


def build_tokenizer(args: ModelArguments, train: Dataset) -> Any:
    """The model's own, with padding; for a fresh model one of the training texts."""
    if args.model_name_or_path is None:
        texts = [text for name in ("text", "text_pair") if name in train.column_names for text in train[name]]
        segments = getattr(args.fresh_config(), "type_vocab_size", 1) > 1
        return train_tokenizer(texts, args.vocabulary_size, framed=True, segments=segments)
    return padded(AutoTokenizer.from_pretrained(args.model_name_or_path))


def padded(tokenizer: Any) -> Any:
    """A tokenizer that can pad, on the right: decoders that have no padding token pad with the end of a text.

    Raises:
        ValueError: It has neither.
    """
    if tokenizer.pad_token is None:
        rule = "a tokenizer must have a padding token, or one for the end of a text to pad with"
        require(tokenizer.eos_token is not None, rule, "neither", "Save it with a pad_token that the model knows.")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"  # on the left, positions of GPT-2 would begin in the padding
    return tokenizer


def build_model(args: ModelArguments, train: Dataset, tokenizer: Any, max_length: int | None) -> PreTrainedModel:
    """The dense start with a head for these classes, and for the low-rank methods its layers factored.

    The tokenizer gets to know which inputs the model takes and how many tokens.
    """
    fresh = vocabulary(tokenizer, args.fresh_config()) if args.model_type else {}
    model = dense_start(AutoModelForSequenceClassification, args, class_names(train) | fresh)
    fit(tokenizer, model, max_length)

    def calibration() -> DataLoader:
        samples = train.shuffle(seed=0).select(range(min(args.calibration_samples, len(train))))
        samples = encode(samples, tokenizer, "train")
        return DataLoader(samples, batch_size=32, collate_fn=DataCollatorWithPadding(tokenizer))

    return factored(model, args, calibration)


def fit(tokenizer: Any, model: PreTrainedModel, max_length: int | None) -> None:
    """Tokenizer and model agree on padding, inputs and lengths.

    Raises:
        ValueError: They disagree, or `max_length` is more than they allow.
    """
    for config in (model.config, model.config.get_text_config()):  # decoders find the last token of a text by it
        config.pad_token_id = tokenizer.pad_token_id
    rows = model.get_input_embeddings().num_embeddings
    remedy = "Take the tokenizer of this model."
    require(len(tokenizer) <= rows, f"tokens must lie in the model's vocabulary of {rows}", len(tokenizer), remedy)
    taken = inspect.signature(model.forward).parameters
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name in taken]
    most = TextModel(model, tokenizer).max_length  # of the tokenizer, and the positions of the model
    require(most or max_length, "max_length must be given where neither model nor tokenizer has one", None, "512, say.")
    rule = f"max_length must be ≤ {most}, the tokens that model and tokenizer take"
    require(
        max_length is None or most is None or max_length <= most, rule, max_length, "Leave it out to take them all."
    )
    tokenizer.model_max_length = max_length or most


def build_teacher(args: ModelArguments, model: PreTrainedModel, tokenizer: Any) -> PreTrainedModel | None:
    """The dense model to distil from, of the same classes in the same order and the same tokens."""
    if args.teacher is None:
        return None
    teacher = AutoModelForSequenceClassification.from_pretrained(args.teacher)
    require_same_classes(teacher, model)
    require_same_tokens(args.teacher, tokenizer)
    return teacher


def require_same_tokens(teacher: str, tokenizer: Any) -> None:
    """Teacher and student read the same token ids."""
    own = AutoTokenizer.from_pretrained(teacher)
    rule = "teacher and student must have the same tokens"
    require(own.get_vocab() == tokenizer.get_vocab(), rule, f"{len(own)} and {len(tokenizer)} that differ")
