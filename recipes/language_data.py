"""Texts of `language_modeling.py`: read, split, and packed into blocks of tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from command_line import require
from data_splits import DataArguments as AnyDataArguments
from data_splits import column, limit, read_splits
from datasets import Dataset, DatasetDict, Features, List, Value
from docstrings import docstrings
from text_data import is_text, require_texts

BLOCK_SIZE = 1024  # where the model takes more


@dataclass
class DataArguments(AnyDataArguments):
    """The texts."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Name on the Hub, a folder, or a file: parquet, csv, json, or txt, whose paragraphs are documents. "
            "If not given: docstrings of libraries that are installed."
        },
    )
    text_column: str | None = field(default=None, metadata={"help": "The only column of text if not given."})
    block_size: int | None = field(
        default=None,
        metadata={"help": f"Tokens of a training sample; by default what the model takes, {BLOCK_SIZE} at most."},
    )
    prompt: str | None = field(
        default=None, metadata={"help": "What the sample goes on from; by default the start of an evaluated text."}
    )
    max_new_tokens: int = field(default=40, metadata={"help": "Length of the sample; 0: none."})

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.block_size is None or self.block_size >= 2, "block_size must be ≥ 2", self.block_size)
        require(self.max_new_tokens >= 0, "max_new_tokens must be ≥ 0", self.max_new_tokens)
        require(self.prompt is None or self.prompt.strip(), "the prompt must have words", self.prompt)


def load_data(args: DataArguments) -> DatasetDict:
    """The splits train, validation and, where the data have one, test, of one column `text`. None of them is empty.

    Raises:
        ValueError: A split or column is missing or empty, or a text is missing.
    """
    data = read_splits(args.dataset_name, args.dataset_config_name) if args.dataset_name else docstrings()
    columns = data["train"].features
    found = [name for name, kind in columns.items() if is_text(kind)]
    source = column(args.text_column, "text_column", columns, found, "text")
    for split, rows in data.items():
        require(source in rows.column_names, f"the {split} split must have a column {source}", rows.column_names)
        require(is_text(rows.features[source]), "text_column must hold text", str(rows.features[source]))
        texts = list(rows[source])
        require_texts(texts, f"column {source} of the {split} split")
        kept = [text for text in texts if text.strip()]
        require(kept, f"the {split} split must hold text", f"{len(texts)} empty rows")
        data[split] = Dataset.from_dict({"text": kept})
    if "validation" not in data:
        documents, remedy = len(data["train"]), "Give a validation split, or more documents."
        require(documents >= 2, "a validation split is held out of two documents or more", documents, remedy)
        parts = data["train"].train_test_split(args.validation_fraction, seed=0)  # whatever the training's seed
        data = DatasetDict({**data, "train": parts["train"], "validation": parts["test"]})
    return limit(data, args)


def pack(rows: Dataset, tokenizer: Any, block_size: int, split: str) -> Dataset:
    """Documents one after the other, each ended by the end-of-text token, cut into blocks: no padding.

    Fewer tokens than a block, at the end of the split, are left out.

    Returns:
        Columns `input_ids` and `labels`, both the block: models shift the labels themselves. Its first token, which
        nothing predicts, is labelled -100, for Trainer divides some models' loss by the number of labels (GPT-2's).

    Raises:
        ValueError: The tokenizer has no end of a text, or the split does not fill a block.
    """
    end = tokenizer.eos_token_id
    require(end is not None, "documents are parted by the tokenizer's end-of-text token", None, "Set its eos_token.")
    rest: list[int] = []

    def blocks(batch: Mapping[str, list[str]]) -> dict[str, list[list[int]]]:
        for ids in tokenizer(batch["text"], return_attention_mask=False, verbose=False)["input_ids"]:
            rest.extend(ids if ids and ids[-1] == end else [*ids, end])
        full = len(rest) - len(rest) % block_size
        packed = [rest[i : i + block_size] for i in range(0, full, block_size)]
        del rest[:full]
        return {"input_ids": packed, "labels": [[-100, *block[1:]] for block in packed]}

    features = Features(dict.fromkeys(("input_ids", "labels"), List(Value("int64"))))
    packed = rows.map(
        blocks,
        batched=True,
        remove_columns=["text"],
        features=features,
        keep_in_memory=True,
        load_from_cache_file=False,
    )
    rule = f"the {split} split must fill a block of {block_size} tokens"
    require(len(packed), rule, f"{len(rest)} tokens", "Lower block_size, or give more text.")
    return packed
