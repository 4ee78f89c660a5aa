"""`TextModel`: a transformers classifier as a map from texts, or tokens with perturbed embeddings, to logits.

A perturbation is added by a forward hook on the input embedding, not through `inputs_embeds`: without token ids, models
that pool the last token (GPT-2, Llama) take padding for it, and encoder-decoders (BART, T5) refuse it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_condlr.robustness.attacks.base import Inputs, count, logits_of, require

Text = str | tuple[str, str]  # a text, or a pair such as (premise, hypothesis)


class TextModel(nn.Module):
    """A batch of B texts ↦ float32 logits (B, classes).

    A batch is a list of strings or of pairs of strings, or a mapping of token tensors as a tokenizer gives them:
    `input_ids` (B, T), `attention_mask` (B, T), perhaps `token_type_ids`. It may have one more entry, `perturbation`
    (B, T, d) in float32, which is added to the output of the input embedding for this call, in float32 even where the
    model is in half precision. The decoder of an encoder-decoder reads unperturbed tokens.

    Args:
        model: A sequence classifier of transformers.
        tokenizer: The model's tokenizer. Without one, batches must be token tensors, and only those special tokens are
            known that the model's config names (BERT's does not name [CLS] and [SEP]).
        max_length: Texts are cut to this number of tokens, at most the number that model and tokenizer allow; None for
            that number.

    Raises:
        AttackError: There is no input embedding, or tokenizer and model disagree on the padding token.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, max_length: int | None = None) -> None:
        super().__init__()
        input_embedding(model)
        require(max_length is None or max_length >= 1, "max_length must be ≥ 1", max_length, "None takes the longest.")
        self.model, self.tokenizer = model, tokenizer
        config: Any = getattr(model, "config", None)
        self.config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        limits = (max_length, getattr(tokenizer, "model_max_length", None), positions(model))
        self.max_length = min((limit for limit in limits if limit and limit < 1e9), default=None)  # 1e30: no limit
        known: set[Any] = {getattr(owner, "pad_token_id", None) for owner in (tokenizer, self.config)} - {None}
        received = f"pad_token_id of {' and '.join(map(str, sorted(known)))}"
        remedy = "Set model.config.pad_token_id = tokenizer.pad_token_id, or load the tokenizer of this model."
        require(len(known) < 2, "tokenizer and model must agree on the padding token", received, remedy)

    def forward(self, inputs: Inputs) -> Tensor:  # -> (B, classes)
        """Logits in float32, for a model of any dtype."""
        tokens = self.tokens(inputs)
        delta = tokens.pop("perturbation", None)
        with nullcontext() if delta is None else perturbed(self._embedding, tokens["input_ids"], delta):
            logits = logits_of(self.model(**tokens, **self.options))
        fits = logits.dim() == 2 and len(logits) == count(tokens) and logits.shape[1] > 1
        received = f"{tuple(logits.shape)} for a batch of {count(tokens)}"
        remedy = "Use a model for sequence classification: AutoModelForSequenceClassification."
        require(fits, "the model must give logits (batch, classes), of two classes at least", received, remedy)
        return logits

    def encode(self, texts: Sequence[Text]) -> Any:
        """A `BatchEncoding` of the texts, padded and cut to `max_length`, on the model's device.

        Raises:
            AttackError: There are no texts, something else than texts, no tokenizer, or no padding token for several.
        """
        require_texts(texts)
        received = f"{len(texts)} texts and tokenizer=None"
        require(self.tokenizer is not None, "texts need a tokenizer", received, "TextModel(model, tokenizer).")
        padded = self.tokenizer.pad_token_id is not None or len(texts) == 1
        remedy = "Set tokenizer.pad_token = tokenizer.eos_token and model.config.pad_token_id = tokenizer.pad_token_id."
        require(padded, "a batch of several texts needs a padding token", "a tokenizer without one", remedy)
        single = isinstance(texts[0], str)
        columns = [list(texts)] if single else [list(column) for column in zip(*texts, strict=True)]
        limit = {"truncation": self.max_length is not None, "max_length": self.max_length}
        return self.tokenizer(*columns, padding=len(texts) > 1, return_tensors="pt", **limit).to(self.device)

    def tokens(self, inputs: Inputs) -> dict[str, Tensor]:
        """The batch as token tensors on the model's device: texts are encoded, a mapping is checked."""
        tokens = dict(inputs if isinstance(inputs, Mapping) else self.encode(inputs))
        tokens = {name: value.to(self.device) for name, value in tokens.items()}
        require_ids(tokens, vocabulary=self.vocabulary)
        padded = count(tokens) == 1 or self.config is None or getattr(self.config, "pad_token_id", None) is not None
        rule = "a batch of several samples needs a model that knows its padding token"
        remedy = "Set model.config.pad_token_id = tokenizer.pad_token_id (tokenizer.pad_token first, if it has none)."
        require(padded, rule, f"{count(tokens)} samples and model.config.pad_token_id=None", remedy)
        return tokens

    @torch.no_grad()
    def embed(self, inputs: Inputs) -> Tensor:  # -> (B, T, d)
        """Float32 output of the input embedding for every token, without the batch's perturbation."""
        return self._embedding(self.tokens(inputs)["input_ids"]).float()

    def editable(self, inputs: Inputs) -> Tensor:  # -> (B, T) bool
        """Tokens of the text itself, neither special nor padding; the unknown token stands for a word of the text."""
        tokens = self.tokens(inputs)
        ids = tokens["input_ids"]
        mask = ~torch.isin(ids, torch.tensor(sorted(self._special_ids()), dtype=ids.dtype, device=ids.device))
        return mask & tokens["attention_mask"].bool() if "attention_mask" in tokens else mask

    @property
    def vocabulary(self) -> int:
        """Number of token ids that the model has embeddings for."""
        return len(self._embedding.weight)

    @property
    def device(self) -> torch.device:
        """Device of the embedding."""
        return self._embedding.weight.device

    @property
    def _embedding(self) -> Any:
        return input_embedding(self.model)  # not an attribute: a module listed twice would be saved twice

    def _special_ids(self) -> set[int]:
        """Ids of special tokens; GPT-2's unknown token, which also ends a text, is one."""
        found: set[Any] = set()
        if self.tokenizer is not None:
            found = set(self.tokenizer.all_special_ids) - {self.tokenizer.unk_token_id}
        for name in ("pad", "bos", "eos", "cls", "sep"):
            for known in (getattr(owner, f"{name}_token_id", None) for owner in (self.config, self.tokenizer)):
                found |= set(known) if isinstance(known, (list, tuple)) else {known} - {None}
        return found


def input_embedding(model: Any) -> Any:
    """The module that looks `input_ids` up, with a `weight` (vocabulary, d).

    T5 and BART never call `model.get_input_embeddings()`, but a module of the encoder that shares its weight.

    Raises:
        AttackError: The model has no such module.
    """
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    try:
        embedding = (model.get_encoder() if encoder_decoder else model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    weight = getattr(embedding, "weight", None)
    rule = "a text model must have an input embedding of tokens"
    remedy = "Use a sequence classifier of transformers, or give yours a method get_input_embeddings()."
    require(isinstance(weight, Tensor) and weight.dim() == 2, rule, type(model).__name__, remedy)
    return embedding


@contextmanager
def perturbed(embedding: nn.Module, ids: Tensor, perturbation: Tensor) -> Iterator[None]:
    """A context in which the first look-up of `ids` (B, T) gives E + perturbation (B, T, d), added in float32.

    Only the first look-up, and only of these ids, is perturbed: GPT-2 looks token types up in the same table, and
    before transformers 5 a decoder its own input. A model may have padded the ids on the right (Longformer).

    Raises:
        AttackError: The dimensions differ, or the ids were never looked up, so that nothing was perturbed.
    """
    waiting = True

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        nonlocal waiting
        size = ids.shape[1]
        if not (waiting and args and torch.equal(args[0][:, :size], ids)):
            return None
        waiting = False
        rule, shape = "a perturbation must be (batch, tokens, d), as the embedding's output", tuple(perturbation.shape)
        expected = (*ids.shape, output.shape[-1])
        require(shape == expected, rule, f"{shape}, not {expected}", "Perturb the batch that was encoded.")
        delta = F.pad(perturbation, (0, 0, 0, output.shape[1] - size))
        return (output.float() + delta).to(output.dtype)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
    rule = "input_ids must be looked up, as (batch, tokens), in the module that get_input_embeddings() returns"
    remedy = "Use a model of another architecture: attacks on this one would change nothing."
    require(not waiting, rule, f"a model that does not call its {type(embedding).__name__} so", remedy)


def positions(model: nn.Module) -> int | None:
    """Largest number of tokens that the model has positions for; RoBERTa's positions start at padding_idx + 1."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return limit if limit is not None and limit > 0 else None


def require_text_model(model: nn.Module) -> TextModel:
    """Require a `TextModel`, and return it."""
    remedy = "Wrap the classifier: TextModel(model, tokenizer)."
    require(isinstance(model, TextModel), "attacks on texts need a TextModel", type(model).__name__, remedy)
    return model  # type: ignore[return-value]


def require_texts(texts: Sequence[Text]) -> None:
    """Require strings only, or pairs of strings only, at least one."""
    require(len(texts), "a batch must hold at least one text", "none", "Skip empty batches.")
    shapes = {
        tuple(isinstance(part, str) for part in text) if isinstance(text, (tuple, list)) else isinstance(text, str)
        for text in texts
    }
    rule, received = (
        "a batch must be a list of strings, or a list of pairs of strings",
        {type(t).__name__ for t in texts},
    )
    remedy = "Take a column of the data set; a batch of token tensors is a dictionary."
    require(shapes in ({True}, {(True, True)}), rule, " and ".join(sorted(received)), remedy)


def require_ids(tokens: Mapping[str, Tensor], *, vocabulary: int) -> None:
    """Require `input_ids` (B, T), at least one, all in the vocabulary."""
    require("input_ids" in tokens, "token tensors must have input_ids", sorted(tokens), "Pass a tokenizer's output.")
    ids = tokens["input_ids"]
    integers = ids.dim() == 2 and ids.numel() and not ids.is_floating_point()
    received, remedy = f"{ids.dtype} of shape {tuple(ids.shape)}", "Skip empty batches, and texts without any token."
    require(integers, "input_ids must be integers (batch, tokens), at least one", received, remedy)
    low, high = torch.stack(ids.aminmax()).tolist()
    rule = f"token ids must lie in the model's vocabulary of {vocabulary}"
    remedy = "Encode with the tokenizer of this model, or call model.resize_token_embeddings(len(tokenizer))."
    require(low >= 0 and high < vocabulary, rule, f"ids from {low} to {high}", remedy)
