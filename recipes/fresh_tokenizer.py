"""A tokenizer trained on the texts that a fresh model is trained on, so that nothing has to be downloaded."""

from collections.abc import Iterable
from typing import Any

from command_line import require
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}


def train_tokenizer(texts: Iterable[str], size: int, *, framed: bool, segments: bool = False) -> Any:
    """Byte pairs, which no character is unknown to.

    Args:
        texts: Of the training split.
        size: Tokens at most, the 256 bytes and 4 special ones among them.
        framed: `<s> text </s>`, or `<s> first </s> second </s>`, as classifiers want it; else the text alone.
        segments: Give `token_type_ids`, which tell the second text of a pair from the first.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    require(size >= len(alphabet) + len(SPECIAL), "vocabulary_size must leave room for all bytes", size, "4000, say.")
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL.values()), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    if framed:
        frame = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=frame
        )
    inputs = ["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"]
    names = SPECIAL | {"cls_token": "<s>", "sep_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names)


def vocabulary(tokenizer: Any, config: PreTrainedConfig) -> dict[str, int]:
    """What the config of a fresh model says of its tokenizer."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    known = {name: value for name, value in ids.items() if hasattr(config, name)}
    return {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | known
