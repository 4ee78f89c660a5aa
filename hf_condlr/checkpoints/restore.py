"""Weights of a checkpoint folder back into a model in memory: what the Trainer resumes from, and its best model."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_condlr.checkpoints.manifest import INDEX_SUFFIX, MANIFEST, UNREADABLE, Manifest
from hf_condlr.checkpoints.verify import (
    FACTOR_DTYPES,
    FETCH,
    check_factors,
    read_headers,
    verify_files,
)
from hf_condlr.distributed.shards import reshard, write_full
from hf_condlr.errors import CheckpointError, listed, require
from hf_condlr.layers import factored_layers

logger = logging.getLogger(__name__)
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")


@torch.no_grad()
def restore_weights(model: nn.Module, folder: str | Path) -> None:
    """Copy every saved tensor into the parameter or buffer it came from; all are checked before the first is changed.

    For a sharded model every process must call it, reads the files, and keeps its own rows.

    Raises:
        CheckpointError: A file is missing or damaged, a tensor is missing, superfluous or of another shape.
    """
    rule = "a checkpoint is a folder"
    remedy = "Name one that the Trainer wrote."
    require(Path(folder).is_dir(), rule, received=repr(str(folder)), remedy=remedy, error=CheckpointError)
    files, manifest = weight_files(Path(folder))
    if manifest is not None:
        verify_files(files, manifest)
    reshard(model)
    places, layers = dict(model.state_dict(keep_vars=True)), factored_layers(model)
    header, stated = read_headers(files), manifest.layers if manifest is not None else {}
    restored = {_storage(places[name]) for name in header if name in places}
    wrong = [f"no {n}" for n, p in places.items() if n not in header and _storage(p) not in restored]  # not tied
    for name, (shape, _) in header.items():
        if name not in places:
            wrong.append(f"unknown {name}")
        elif shape != tuple(places[name].shape):
            wrong.append(f"{name} of shape {shape} for {tuple(places[name].shape)}")
    for name in layers if stated else ():
        dtype = header.get(f"{name}.S", ((), ""))[1]
        if name not in stated or dtype not in FACTOR_DTYPES:
            wrong.append(f"factors {name} of {dtype}, which {CONFIG_NAME} does not state")
    rule = "a checkpoint must hold the tensors of this model"
    remedy = "Build the model with the config it was saved with; nothing was loaded."
    require(not wrong, rule, received=listed(wrong), remedy=remedy, error=CheckpointError)
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    for name in layers if stated else ():
        factors = (tensors[f"{name}.U"], tensors[f"{name}.S"], tensors[f"{name}.V"])
        check_factors(name, factors, stated[name], FACTOR_DTYPES[header[f"{name}.S"][1]])
    for name, tensor in tensors.items():
        write_full(places[name], tensor)
    for name, layer in layers.items():
        layer.refresh_bound()
        if stated:
            layer.bound = stated[name].bound


def _storage(p: Tensor) -> int:
    """Identity of the storage, which tied parameters share; shards without rows have no storage."""
    return id(p) if isinstance(p, DTensor) else p.data_ptr()


def weight_files(folder: Path) -> tuple[list[Path], Manifest | None]:
    """The weight files of a checkpoint folder, and its manifest; that of a plain torch module has none."""
    config, manifest = folder / CONFIG_NAME, None
    if config.is_file() and (stated := _read_json(config).get(MANIFEST)) is not None:
        manifest = Manifest.from_dict(stated)
        weights = folder / manifest.weights
    else:
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        weights = index if index.is_file() else folder / SAFE_WEIGHTS_NAME
    if not weights.name.endswith(INDEX_SUFFIX):
        return [weights], manifest
    names = {Path(str(name)).name for name in _read_json(weights, "weight_map").values()}
    return [folder / name for name in sorted(names)], manifest


def _read_json(path: Path, field: str | None = None) -> dict[str, Any]:
    """The object in a file, or the one in its `field`."""
    try:
        if not path.is_file():
            raise OSError("no such regular file")
        values = json.loads(path.read_text(encoding="utf-8"))
        return dict(values if field is None else values[field])
    except (OSError, *UNREADABLE) as error:
        raise CheckpointError(
            "a checkpoint's JSON files must be readable", received=f"{path}: {error}", remedy=FETCH
        ) from error


def checkpoints_in(folder: Path) -> list[Path]:
    """The Trainer's checkpoints, most steps first; a copy under another name belongs to the user."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def complete_checkpoints(folder: Path) -> Iterator[Path]:
    """Checkpoints of `checkpoints_in` whose writing was not interrupted: the Trainer's state is written last."""
    for path in checkpoints_in(folder):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s is incomplete and is skipped", path)
        else:
            yield path


def last_complete_checkpoint(folder: str) -> str:
    """The first of `complete_checkpoints`; `CheckpointError` where there is none."""
    found = next(complete_checkpoints(Path(folder)), None)
    rule = "resume_from_checkpoint=True needs a checkpoint in output_dir"
    remedy = "Start from the beginning, or name a checkpoint's folder."
    require(found, rule, received=f"none in {folder} that is complete", remedy=remedy, error=CheckpointError)
    return str(found)
