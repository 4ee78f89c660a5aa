"""Everything that may change the numbers of an evaluation, and a key that identifies the evaluation."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_condlr.robustness.attacks.base import Attack
from hf_condlr.robustness.evaluation.samples import Samples


def parameters_digest(model: nn.Module) -> str:
    """SHA-256 of names, shapes, types and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        for part in _ordinary_tensors(value):
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _ordinary_tensors(value: Any) -> Iterator[Any]:
    """The tensor itself, or those that a quantized one consists of."""
    if is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from _ordinary_tensors(getattr(value, name))
    else:
        yield value


def versions() -> dict[str, str]:
    """Versions of all packages that may change the numbers."""
    found = {"python": platform.python_version()}
    for package in ("hf_condlr", "torch", "transformers", "datasets", "accelerate", "numpy", "pyautoattack", "torchao"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def evaluation_key(settings: dict[str, Any], attacks: Sequence[Attack], examples: bool) -> str:
    """Identifies an evaluation: only the same one is resumed."""
    sources = [parameters_digest(source) for attack in attacks if (source := getattr(attack, "source", None))]
    text = json.dumps([settings, [attack.settings() for attack in attacks], sources, examples], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe(samples: Samples, batch_size: int) -> dict[str, Any]:
    """Describe an evaluation's model and data, as JSON values."""
    normalisation = {key: getattr(samples.model, key, None) for key in ("mean", "std")}
    return {
        "model_digest": parameters_digest(samples.model),
        "dtype": str(next((p.dtype for p in samples.model.parameters()), torch.float32)).removeprefix("torch."),
        "data": samples.kind,
        "columns": [*samples.columns, samples.label_column],
        "processor": type(samples.processor).__name__ if samples.processor is not None else None,
        "data_rows": len(samples.dataset),
        "data_digest": samples.fingerprint(batch_size),
        "data_fingerprint": getattr(samples.dataset, "_fingerprint", None),
        "batch_size": batch_size,
        **{key: value.flatten().tolist() for key, value in normalisation.items() if isinstance(value, Tensor)},
    }
