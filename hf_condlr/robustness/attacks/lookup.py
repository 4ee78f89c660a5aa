"""The look-up of a text's tokens inside a transformers model: where it happens, and how its result is perturbed."""

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

    T5 and BART call an encoder's module that shares its weight with `model.get_input_embeddings()`, never that one.

    Raises:
        AttackError: There is none.
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
    """While it lasts, the first look-up of `ids` (B, T) gives E + perturbation (B, T, d), added in float32.

    Only the first, and only of these ids: GPT-2 looks token types up in the same table, and before transformers 5 a
    decoder its own input. A model may have padded the ids to the right (Longformer).

    Raises:
        AttackError: The dimensions differ, or the ids were never looked up, so that nothing would be attacked.
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
