"""Texts, or pairs of texts, and labels of `text_classification.py`: read, checked, split, and made into tokens."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from command_line import require
from data_splits import column, limit, read_splits
from datasets import Dataset, DatasetDict, Value
from docstrings import docstrings
from labelled_data import LabelledDataArguments, labelled

logger = logging.getLogger(__name__)
LABELS = ("label", "labels")
PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text", "text_pair")),
    *(("question", "sentence"), ("question", "passage")),
)  # that are both taken without being named: another second column may be an identifier


@dataclass
class DataArguments(LabelledDataArguments):
    """The texts, and the attacks that the test split meets."""

    attacked: ClassVar[tuple[str, ...]] = ("tokens", "texts")
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Name on the Hub, a folder, or a file: parquet, csv or json. If not given: docstrings of libraries "
            "that are installed, classified by library."
        },
    )
    attacks: list[str] = field(
        default_factory=lambda: ["pgd-embedding"],
        metadata={"help": "Attacks on the test split: fgm-embedding, pgd-embedding, search-embedding, characters."},
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One column or two, if not the only one of text or a pair of usual names."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Cut texts to so many tokens; by default to what the model takes."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_length is None or self.max_length >= 3, "max_length must be ≥ 3", self.max_length)
        columns = self.text_columns
        rule = "text_columns must be one column or two different ones"
        require(columns is None or len(columns) == len(set(columns)) in (1, 2), rule, columns)


def load_data(args: DataArguments) -> DatasetDict:
    """The splits train, validation and, where the data have one, test.

    Columns: `text`, for pairs `text_pair`, `labels`, and `row`, the number in the split as read.

    Raises:
        ValueError: A split or column is missing or empty, a text is missing or none, or labels do not make at least
            two known classes.
    """
    data = read_splits(args.dataset_name, args.dataset_config_name) if args.dataset_name else docstrings()
    texts = _text_columns(args, data["train"].features)
    for split, rows in data.items():
        for name in set(texts) & set(rows.column_names):
            require_texts(list(rows[name]), f"column {name} of the {split} split")
    used = dict(zip(texts, ("text", "text_pair"), strict=False))
    return limit(labelled(data, args, used, names=LABELS), args)


def _text_columns(args: DataArguments, columns: Mapping[str, Any]) -> list[str]:
    found = [name for name, kind in columns.items() if is_text(kind) and name not in (*LABELS, args.label_column)]
    if args.text_columns is None:
        pair = [list(names) for names in PAIRS if set(names) <= set(found)]
        return pair[0] if pair else [column(None, "text_columns", columns, found, "text")]
    texts = [column(name, "text_columns", columns, found, "text") for name in args.text_columns]
    others = {name: str(columns[name]) for name in texts if not is_text(columns[name])}
    require(not others, f"text_columns must hold text, as {', '.join(found) or 'no column here'} does", others)
    return texts


def is_text(kind: Any) -> bool:
    """Whether a column's feature is strings."""
    return isinstance(kind, Value) and kind.dtype in ("string", "large_string")


def require_texts(texts: list[str | None], where: str) -> None:
    """No text of a column is missing; empty ones are said."""
    missing = next((row for row, text in enumerate(texts) if text is None), None)
    remedy = f"Mend or remove row {missing} (csv: an empty cell, NA and null are no text)."
    require(missing is None, f"every row must have a text in {where}", None, remedy)
    empty = [row for row, text in enumerate(texts) if not text.strip()]
    if empty:
        logger.warning("%d of %d texts in %s are empty, that of row %d first", len(empty), len(texts), where, empty[0])


def encode(rows: Dataset, tokenizer: Any, split: str) -> Dataset:
    """Token tensors and labels. Longer texts are cut to the tokenizer's `model_max_length`, and a warning says so.

    Raises:
        ValueError: A text has no tokens, or there are pairs and the tokenizer puts nothing between two texts.
    """
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]
    if len(columns) == 2:
        one, both = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True))
        rule = "pairs need a tokenizer that puts special tokens between two texts"
        remedy = "Join the two columns by words of your own into one, or take an encoder such as BERT."
        require(both > one, rule, f"{type(tokenizer).__name__}, which glues them together", remedy)

    def tokens(batch: dict[str, list[str]]) -> dict[str, Any]:
        encoded = tokenizer(*(batch[name] for name in columns), truncation=True)
        cut = [bool(text.overflowing) for text in encoded.encodings or []]  # a slow tokenizer does not tell
        return {**encoded, "cut": cut or [False] * len(encoded["input_ids"])}

    encoded = rows.map(tokens, batched=True, remove_columns=columns, keep_in_memory=True, load_from_cache_file=False)
    nothing = next((row for row, ids in zip(rows["row"], encoded["input_ids"], strict=True) if not ids), None)
    if nothing is not None:
        rule, remedy = "a text must have at least one token", "Remove it, or take a tokenizer that frames texts."
        require(False, rule, f"an empty one in row {nothing} of the {split} split", remedy)
    cut, most = sum(encoded["cut"]), tokenizer.model_max_length
    if cut:
        logger.warning("%d of %d texts of the %s split are cut to %d tokens", cut, len(rows), split, most)
    return encoded.remove_columns(["cut", "row"])
