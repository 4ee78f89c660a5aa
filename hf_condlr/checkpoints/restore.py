"""Weights of a checkpoint folder back into a model in memory: what the Trainer resumes from, and its best model."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_condlr.checkpoints.verify import check_factors, read_headers, verify_files, weight_files
from hf_condlr.distributed.shards import reshard, write_full
from hf_condlr.errors import CheckpointError
from hf_condlr.layers import factored_layers

logger = logging.getLogger(__name__)


@torch.no_grad()
def restore_weights(model: nn.Module, folder: str | Path) -> None:
    """Copy every saved tensor into the parameter or buffer it came from; all are checked before the first is changed.

    Of a sharded model every process must call it, reads the files, and keeps its own rows.

    Raises:
        CheckpointError: A file is missing or damaged, a tensor is missing, superfluous or of another shape.
    """
    if not Path(folder).is_dir():
        raise CheckpointError(
            "a checkpoint is a folder", received=repr(str(folder)), remedy="Name one that the Trainer wrote."
        )
    files, manifest = weight_files(Path(folder))
    if manifest is not None:
        verify_files(files, manifest)
    reshard(model)
    places = dict(model.state_dict(keep_vars=True))
    stored = read_headers(files)
    restored = {_storage(places[name]) for name in stored if name in places}
    wrong = [f"no {n}" for n, p in places.items() if n not in stored and _storage(p) not in restored]  # not tied
    wrong += [f"unknown {name}" for name in stored if name not in places]
    wrong += [
        f"{name} of shape {shape} for {tuple(places[name].shape)}"
        for name, (shape, _) in stored.items()
        if name in places and shape != tuple(places[name].shape)
    ]
    if wrong:
        raise CheckpointError(
            "a checkpoint must hold the tensors of this model",
            received=", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""),
            remedy="Build the model with the config it was saved with; nothing was loaded.",
        )
    layers = factored_layers(model)
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    stated = manifest.layers if manifest is not None else {}
    for name in layers if stated else ():
        factors = (tensors[f"{name}.U"], tensors[f"{name}.S"], tensors[f"{name}.V"])
        check_factors(name, factors, stated[name], stored[f"{name}.S"][1])
    for name, tensor in tensors.items():
        write_full(places[name], tensor)
    for name, layer in layers.items():
        layer.refresh_bound()
        if stated:
            layer.bound = stated[name].bound


def _storage(p: Tensor) -> int:
    """What tied parameters have in common; shards without rows have no storage."""
    return id(p) if isinstance(p, DTensor) else p.data_ptr()


def last_whole_checkpoint(folder: str) -> str:
    """The checkpoint of the most steps whose writing was not interrupted: the Trainer's state comes last.

    Raises:
        CheckpointError: There is none.
    """
    found = [p for p in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rpartition("-")[2].isdigit()]
    found.sort(key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            logger.warning("%s was not written whole and is passed over", path)
            continue
        return str(path)
    raise CheckpointError(
        "resume_from_checkpoint=True needs a checkpoint in output_dir",
        received=f"{len(found)} that were not written whole in {folder}" if found else f"none in {folder}",
        remedy="Start anew, or name a checkpoint's folder.",
    )
