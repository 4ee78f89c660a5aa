"""Factors of converted layers that train inside a `PeftModel`, which saves only its adapter."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_condlr.distributed.shards import write_full
from hf_condlr.errors import CheckpointError, listed, require
from hf_condlr.layers import converted_layers

FACTORS_NAME = "condlr_factors.safetensors"


def save_factors(model: nn.Module, folder: str | Path) -> None:
    """Write the factors of a `PeftModel` next to its adapter, if any of them trains."""
    factors = _factors(model)
    if any(p.requires_grad for p in factors.values()):
        save_file({name: p.detach().contiguous() for name, p in factors.items()}, str(Path(folder, FACTORS_NAME)))


@torch.no_grad()
def load_factors(model: nn.Module, folder: str | Path) -> None:
    """Read back what `save_factors` wrote into `folder`, if anything.

    Raises:
        CheckpointError: The file is of another model.
    """
    path = Path(folder, FACTORS_NAME)
    if not path.is_file():
        return
    factors, stored = _factors(model), load_file(str(path))
    wrong = sorted(factors.keys() ^ stored.keys())
    wrong += [name for name in factors.keys() & stored.keys() if factors[name].shape != stored[name].shape]
    require(
        not wrong,
        "a checkpoint must hold the factors of this model",
        received=f"a difference in {listed(wrong)}",
        remedy="Build the model with the config it was saved with; nothing was loaded.",
        error=CheckpointError,
    )
    for name, p in factors.items():
        write_full(p, stored[name])
    for layer in converted_layers(model).values():
        layer.refresh_bound()


def _factors(model: nn.Module) -> dict[str, Tensor]:
    if not isinstance(model, PeftModel):
        return {}
    return {f"{name}.{kind}": getattr(layer, kind) for name, layer in converted_layers(model).items() for kind in "USV"}
