"""Weights of a checkpoint folder back into a model in memory: what the Trainer resumes from, and its best model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_condlr.checkpoints.manifest import INDEX_SUFFIX, MANIFEST, SUFFIX, UNREADABLE, Manifest
from hf_condlr.checkpoints.verify import (
    FACTOR_DTYPES,
    FETCH,
    check_factors,
    read_headers,
    require_regular_files,
    verify_files,
)
from hf_condlr.distributed.shards import reshard, write_full
from hf_condlr.errors import CheckpointError, listed, require
from hf_condlr.layers import factored_layers

logger = logging.getLogger(__name__)


@torch.no_grad()
def restore_weights(model: nn.Module, folder: str | Path) -> None:
    """Copy every saved tensor into the parameter or buffer it came from; all are checked before the first is changed.

    For a sharded model every process must call it, reads the files, and keeps its own rows.

    Raises:
        CheckpointError: A file is missing or damaged, a tensor is missing, superfluous or of another shape.
    """
    require(
        Path(folder).is_dir(),
        "a checkpoint is a folder",
        received=repr(str(folder)),
        remedy="Name one that the Trainer wrote.",
        error=CheckpointError,
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
    require(
        not wrong,
        "a checkpoint must hold the tensors of this model",
        received=listed(wrong),
        remedy="Build the model with the config it was saved with; nothing was loaded.",
        error=CheckpointError,
    )
    layers = factored_layers(model)
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    stated = manifest.layers if manifest is not None else {}
    for name in layers if stated else ():
        factors = (tensors[f"{name}.U"], tensors[f"{name}.S"], tensors[f"{name}.V"])
        require(
            name in stated and stored[f"{name}.S"][1] in FACTOR_DTYPES,
            f"{CONFIG_NAME} must state every factored layer of this model, and factors must be real",
            received=f"{name} of {stored[f'{name}.S'][1]}",
            remedy=FETCH,
            error=CheckpointError,
        )
        check_factors(name, factors, stated[name], FACTOR_DTYPES[stored[f"{name}.S"][1]])
    for name, tensor in tensors.items():
        write_full(places[name], tensor)
    for name, layer in layers.items():
        layer.refresh_bound()
        if stated:
            layer.bound = stated[name].bound


def _storage(p: Tensor) -> int:
    """What tied parameters have in common; shards without rows have no storage."""
    return id(p) if isinstance(p, DTensor) else p.data_ptr()


def weight_files(folder: Path) -> tuple[list[Path], Manifest | None]:
    """The weight files of a checkpoint folder, and its manifest; that of a plain torch module has none."""
    config, manifest = folder / CONFIG_NAME, None
    if config.is_file() and (values := _read_json(config).get(MANIFEST)) is not None:
        manifest = Manifest.from_dict(values)
        require_regular_files(folder, manifest)
        weights = folder / manifest.weights
    else:
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        weights = index if index.is_file() else folder / SAFE_WEIGHTS_NAME
    if not weights.name.endswith(INDEX_SUFFIX):
        return [weights], manifest
    try:
        names = {Path(name).name for name in _read_json(weights)["weight_map"].values()}
        if not names or not all(name.endswith(SUFFIX) for name in names):
            raise ValueError("it names other files than weights")
    except UNREADABLE as error:
        raise _unreadable(weights, error) from error
    return [folder / name for name in sorted(names)], manifest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise OSError("no such regular file")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    return values


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError("a checkpoint's JSON files must be readable", received=f"{path}: {error}", remedy=FETCH)


def last_complete_checkpoint(folder: str) -> str:
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
            logger.warning("%s is incomplete and is passed over", path)
            continue
        return str(path)
    raise CheckpointError(
        "resume_from_checkpoint=True needs a checkpoint in output_dir",
        received=f"{len(found)} incomplete ones in {folder}" if found else f"none in {folder}",
        remedy="Start anew, or name a checkpoint's folder.",
    )
