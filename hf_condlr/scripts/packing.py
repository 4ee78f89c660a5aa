"""`pack_texts`: documents joined and cut into blocks of equal length, which causal language models train on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_condlr.scripts.checks import check, check_data

if TYPE_CHECKING:
    from datasets import Dataset


def pack_texts(rows: Dataset, tokenizer: Any, block_size: int, split: str, *, most: int | None = None) -> Dataset:
    """Documents one after the other, each ended by the end-of-text token, cut into blocks without padding.

    What does not fill a block at the end is left out, and so are texts without a letter.

    Args:
        rows: Rows with the column `text`.
        tokenizer: The model's tokenizer; it has an end-of-text token.
        block_size: Tokens of a block.
        split: Name of the rows, for messages.
        most: Number of blocks that are enough; by default all.

    Returns:
        Columns input_ids and labels, both the block: models shift the labels themselves. Its first token, which nothing
        predicts, is labelled -100, for Trainer divides some models' loss by the number of labels (GPT-2's).

    Raises:
        ConfigError: The tokenizer has no end-of-text token.
        EvaluationError: The rows fill no block.
    """
    from datasets import Dataset, Features, List, Value

    end = tokenizer.eos_token_id
    rule = "documents are separated by the tokenizer's end-of-text token"
    check(end is not None, rule, "None", "Set eos_token.")
    rest: list[int] = []
    blocks: list[list[int]] = []
    for batch in rows.iter(1000):
        texts = [text for text in batch["text"] if text and text.strip()]
        for ids in tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else []:
            rest.extend(ids if ids and ids[-1] == end else [*ids, end])
        full = len(rest) - len(rest) % block_size
        blocks += [rest[i : i + block_size] for i in range(0, full, block_size)]
        del rest[:full]
        if most is not None and len(blocks) >= most:
            break
    rule, remedy = (
        f"the {split} split must fill a block of {block_size} tokens",
        "Take smaller blocks, or give more text.",
    )
    check_data(bool(blocks), rule, len(rest), remedy)
    features = Features(dict.fromkeys(("input_ids", "labels"), List(Value("int64"))))
    columns = {"input_ids": blocks[:most], "labels": [[-100, *block[1:]] for block in blocks[:most]]}
    return Dataset.from_dict(columns, features=features)
