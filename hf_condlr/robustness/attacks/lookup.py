"""The input embedding of a transformers model: which module it is, and how its output is perturbed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_condlr.robustness.attacks.base import require


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
    require(
        isinstance(weight, Tensor) and weight.dim() == 2,
        "a text model must have an input embedding of tokens",
        type(model).__name__,
        "Use a sequence classifier of transformers, or give yours a method get_input_embeddings().",
    )
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
        require(
            perturbation.shape == (*ids.shape, output.shape[-1]),
            "a perturbation must be (batch, tokens, d), as the embedding's output",
            f"{tuple(perturbation.shape)}, not {(*ids.shape, output.shape[-1])}",
            "Perturb the batch that was encoded.",
        )
        delta = F.pad(perturbation, (0, 0, 0, output.shape[1] - size))
        return (output.float() + delta).to(output.dtype)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
    require(
        not waiting,
        "input_ids must be looked up, as (batch, tokens), in the module that get_input_embeddings() returns",
        f"a model that does not call its {type(embedding).__name__} so",
        "Use a model of another architecture: attacks on this one would change nothing.",
    )
