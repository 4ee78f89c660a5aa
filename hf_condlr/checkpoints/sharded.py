"""Checkpoints of a sharded training: every process writes and reads its own rows, and nothing is gathered or pickled.

    weights/    shard-*.safetensors, torch's distributed checkpoints in its HuggingFace form
    optimizer/  the same, of the optimizer's tensors
    state.json  the files' digests, what is stated of each layer, the optimizer's numbers, the conditioning schedule

They resume a training, on any number of processes. To hand a model on, `save_pretrained` gathers the factors into an
ordinary checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hf_condlr.checkpoints.manifest import UNREADABLE, StoredLayer
from hf_condlr.checkpoints.verify import FETCH, check_factors
from hf_condlr.distributed.shards import reshard
from hf_condlr.errors import CheckpointError, listed, require
from hf_condlr.files import digest, flush
from hf_condlr.layers import factored_layers
from hf_condlr.manifold.step import ManifoldStep

STATE, WEIGHTS, OPTIMIZER = "state.json", "weights", "optimizer"
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # one entry for each parameter's each tensor or number


@torch.no_grad()
def save_sharded(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    manifold_step: ManifoldStep | None = None,
) -> None:
    """Write a checkpoint to resume from. Every process must call it, on a shared file system, and writes its own rows.

    Args:
        folder: Folder that appears when everything is written; an earlier one of this name is replaced.
        model: Sharded by `fully_shard`.
        optimizer: The model's optimizer.
        manifold_step: The handle of `attach_manifold_step`; the model must be settled.

    Raises:
        CheckpointError: The files could not be written.
        OptimizerError: The model is not settled.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # it warns where it is not used

    reshard(model)
    state: dict[str, Any] = {"manifold_step": None if manifold_step is None else manifold_step.state_dict()}
    state["layers"] = {name: StoredLayer.of(layer).to_dict() for name, layer in factored_layers(model).items()}
    target, staging, previous = _places(folder)
    parts: dict[str, dict[str, Any]] = {WEIGHTS: dict(get_model_state_dict(model))}
    if optimizer is not None:
        tensors, state["optimizer"] = _split(get_optimizer_state_dict(model, optimizer, options=_FLAT))
        parts[OPTIMIZER] = tensors

    def begin() -> None:
        if previous.exists() and not target.exists():  # a process was killed between the two renames
            os.rename(previous, target)
        shutil.rmtree(staging, ignore_errors=True)
        for part in parts:
            (staging / part).mkdir(parents=True)

    def finish() -> None:
        (staging / STATE).write_text(json.dumps(state))
        flush(staging / STATE)
        shutil.rmtree(previous, ignore_errors=True)
        if target.exists():
            os.rename(target, previous)
        os.rename(staging, target)
        shutil.rmtree(previous, ignore_errors=True)

    with _reported(target):
        _on_first(begin)
        for part, tensors in parts.items():
            writer = HuggingFaceStorageWriter(str(staging / part), save_distributed=True)
            save(tensors, storage_writer=writer)  # returns when all processes have written, or raises on all
        state["files"] = _digests(staging)
        _on_first(finish)


@torch.no_grad()
def load_sharded(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    manifold_step: ManifoldStep | None = None,
) -> None:
    """Resume from a checkpoint of `save_sharded`. Every process must call it, and reads its own rows.

    Args:
        folder: Folder of the checkpoint. If a save was killed while it replaced this folder, the replaced one is read.
        model: Sharded by `fully_shard`, not necessarily over as many processes.
        optimizer: The model's optimizer; where the checkpoint has its state.
        manifold_step: The handle; where the checkpoint has its state.

    Raises:
        CheckpointError: A part is missing, a file or a tensor is missing or another one, or factors do not obey what
            the checkpoint states of them. Only in the last case may the model have been changed.
    """
    target, _, previous = _places(folder)
    if previous.exists() and not target.exists():
        target = previous
    with _reported(target):
        state = json.loads((target / STATE).read_text())
        layers = {name: StoredLayer.from_dict(values) for name, values in state["layers"].items()}
        stated, found = dict(state["files"]), _digests(target)
    own, wanted = factored_layers(model), {"optimizer": optimizer, "manifold_step": manifold_step}
    wrong = [f"another {name}" for name in sorted(stated | found) if stated.get(name) != found.get(name)]
    wrong += [f"no {name}" for name, value in wanted.items() if value is not None and state.get(name) is None]
    wrong += [f"factors of {name} there or here only" for name in sorted(own.keys() ^ layers.keys())]
    rule = "a sharded checkpoint must hold the files that were saved, and the tensors to load"
    remedy = f"Build the model with the config it was saved with. Changed files are damaged: {FETCH}"
    require(not wrong, rule, received=f"{listed(wrong)} in {target}", remedy=remedy, error=CheckpointError)
    reshard(model)
    if optimizer is not None:
        # First: torch makes the tensors of a fresh optimizer by a step that moves nothing, but counts as one.
        values = get_optimizer_state_dict(model, optimizer, options=_FLAT)
        tensors, _ = _split(values)
        _read(target / OPTIMIZER, tensors)
        set_optimizer_state_dict(model, optimizer, values | tensors | state["optimizer"], options=_FLAT)
    weights = get_model_state_dict(model)
    _read(target / WEIGHTS, weights)
    set_model_state_dict(model, weights)
    for name, layer in own.items():
        check_factors(name, (layer.U, layer.S, layer.V), layers[name], layer.S.dtype)
        layer.bound = layers[name].bound
    if manifold_step is not None:
        manifold_step.load_state_dict(state["manifold_step"])


def _places(folder: str | os.PathLike[str]) -> tuple[Path, Path, Path]:
    """The folder of a checkpoint, the one it is written into, and that of an earlier one while it is replaced."""
    target = Path(folder)
    return target, target.with_name(f"{target.name}.partial"), target.with_name(f"{target.name}.replaced")


def _digests(folder: Path) -> dict[str, str]:
    """Digests of all files but the state; every process reads its share. An error of one is raised by all."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir() and path != folder / STATE)
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        own: Any = {path.relative_to(folder).as_posix(): digest(path) for path in files[rank::size]}
    except OSError as error:
        own = error
    results: list[Any] = [None] * size
    dist.all_gather_object(results, own)
    if errors := [result for result in results if isinstance(result, OSError)]:
        raise errors[0]
    return {name: value for result in results for name, value in result.items()}


def _on_first(work: Callable[[], None]) -> None:
    """Run `work` on the first process while the others wait; if it fails, all raise its error."""
    failure: list[OSError | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except OSError as error:
            failure = [error]
    dist.broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]


def _split(values: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split values into tensors, for safetensors, and the rest, for JSON."""
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in values.items() if name not in tensors}


def _read(folder: Path, tensors: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    with _reported(folder):
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))


@contextmanager
def _reported(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, CheckpointException, *UNREADABLE) as error:
        raise CheckpointError(
            "a sharded checkpoint must be written and read completely",
            received=f"{folder}: {(str(error).strip() or type(error).__name__).splitlines()[-1]}",
            remedy="Save it with save_sharded of a model converted with the same config, or use an earlier one.",
        ) from error
