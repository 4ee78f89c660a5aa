"""What the speed benchmarks share: models with random weights and batches for them, interleaved timing, ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_condlr import CondLRConfig, get_robust_lowrank_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONFIGS: dict[str, tuple[type[PreTrainedModel], Any, dict[str, int]]] = {
    "vit-b16": (ViTForImageClassification, ViTConfig, {"num_labels": 10}),
    # the shape of all-MiniLM-L6-v2
    "minilm": (
        BertForSequenceClassification,
        BertConfig,
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
    # to see whether a script runs
    "tiny": (
        BertForSequenceClassification,
        BertConfig,
        {
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
    ),
}


def build(name: str, layers: int | None = None) -> PreTrainedModel:
    """A classifier with random weights, of `layers` blocks if given."""
    model_class, config_class, values = CONFIGS[name]
    return model_class(config_class(**values | ({"num_hidden_layers": layers} if layers else {})))


def linear_names(model: nn.Module) -> list[str]:
    """The linear layers beside the head."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "classifier"]


def factor(model: PreTrainedModel, compression_ratio: float, rank_multiple: int = 1) -> PreTrainedModel:
    """All linear layers but the head as U S Vᵀ, `compression_ratio` of their weights removed; in place."""
    config = CondLRConfig(
        target_modules=linear_names(model), compression_ratio=compression_ratio, rank_multiple=rank_multiple
    )
    return get_robust_lowrank_model(model, config)


def tokens_of(model: PreTrainedModel, tokens: int) -> int:
    """Of one sample: a picture has those of its patches, a text `tokens`."""
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


def any_device() -> torch.device:
    """CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(dtype: str, device: torch.device) -> AbstractContextManager:
    """Half precision around a forward pass; nothing for float32."""
    return torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32")


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call, the device's work included.

    On a CPU with one thread, the time of the process: what others do on a shared machine then moves it far less.
    """
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` of each in turn, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            elapsed = seconds(call, device)
            if turn:
                times[name].append(elapsed)
    return times


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (least … most)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} … {max(values):.{digits}f})"


def ratios(values: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round, so that a machine that was slow for a while was slow for both."""
    return [a / b for a, b in zip(values, base, strict=True)]
