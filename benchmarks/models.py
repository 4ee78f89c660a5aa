"""What the benchmarks measure: models with random weights, and batches of noise for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_condlr import CondLRConfig, get_robust_lowrank_model
from hf_condlr.config import Start
from hf_condlr.layers import LowRankLayer
from hf_condlr.linalg import condition_number, orthonormality_error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
LLAMA = {
    **{"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "vocab_size": 32_000},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "pad_token_id": 0},
}
CONFIGS: dict[str, tuple[type[PreTrainedModel], Any, dict[str, int]]] = {
    "vit-b16": (ViTForImageClassification, ViTConfig, {"num_labels": 10}),
    "llama-1b": (LlamaForSequenceClassification, LlamaConfig, LLAMA),  # the blocks of Llama-3.2-1B, fewer tokens
    "tiny-llama": (LlamaForSequenceClassification, LlamaConfig, LLAMA | TINY | {"num_key_value_heads": 1}),
    "minilm": (BertForSequenceClassification, BertConfig, MINILM),  # the shape of all-MiniLM-L6-v2
    "tiny": (BertForSequenceClassification, BertConfig, TINY),  # to see whether a script runs
}


def build(name: str, layers: int | None = None) -> PreTrainedModel:
    """A classifier with random weights, of `layers` blocks if given."""
    model_class, config_class, values = CONFIGS[name]
    return model_class(config_class(**values | ({"num_hidden_layers": layers} if layers else {})))


HEADS: dict[type, str] = {model_class: "classifier" for model_class, _, _ in CONFIGS.values()}
HEADS[LlamaForSequenceClassification] = "score"


def linear_names(model: nn.Module) -> list[str]:
    """Names of the linear layers, without the head."""
    head = HEADS[type(model)]
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != head]


def factor(
    model: PreTrainedModel, compression_ratio: float, rank_multiple: int = 1, init_weights: Start = "svd"
) -> PreTrainedModel:
    """All linear layers but the head as U S Vᵀ, `compression_ratio` of their weights removed; in place."""
    config = CondLRConfig(
        target_modules=linear_names(model),
        compression_ratio=compression_ratio,
        rank_multiple=rank_multiple,
        init_weights=init_weights,
    )
    return get_robust_lowrank_model(model, config)


def tokens_of(model: PreTrainedModel, tokens: int) -> int:
    """Tokens of one sample: a picture has those of its patches, a text `tokens`."""
    if model.main_input_name != "pixel_values":
        return tokens
    return (model.config.image_size // model.config.patch_size) ** 2 + 1


def batch_for(model: PreTrainedModel, batch_size: int, tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Noise: what a pass costs does not depend on the values."""
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": torch.randn(batch_size, 3, size, size, device=device)}
    ids = torch.randint(0, model.config.vocab_size, (batch_size, tokens), device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def autocast(dtype: str, device: torch.device) -> AbstractContextManager:
    """Half precision around a forward pass; nothing for float32."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def worst_errors(
    layers: Mapping[str, LowRankLayer], rounded: Callable[[Tensor], Tensor] = lambda X: X
) -> tuple[float, float]:
    """Largest ‖UᵀU − I‖_F/√r of a basis and largest κ(S) over its bound, of factors after `rounded`, in float64."""
    bases = [basis.detach() for x in layers.values() for basis in (x.U, x.V)]
    errors = [orthonormality_error(rounded(U)).item() / math.sqrt(U.shape[-1]) for U in bases]
    ratios = [condition_number(rounded(x.S.detach())).item() / x.bound for x in layers.values()]
    return tuple(max(x if math.isfinite(x) else math.inf for x in values) for values in (errors, ratios))
