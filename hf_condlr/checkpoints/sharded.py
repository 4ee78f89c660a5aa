"""Checkpoints of a sharded training: every process writes and reads its own rows, and nothing is gathered or pickled.

    weights/    shard-*.safetensors, torch's distributed checkpoints in its HuggingFace form
    optimizer/  the same, of the optimizer's tensors
    state.json  each layer's bound, the optimizer's numbers, and where the conditioning schedule stands

They resume a training, on as many processes as you like. To hand a model on, `save_pretrained` gathers the factors into
an ordinary checkpoint.
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

from hf_condlr.checkpoints.manifest import StoredLayer
from hf_condlr.checkpoints.verify import check_factors
from hf_condlr.distributed.shards import reshard
from hf_condlr.errors import CheckpointError
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
    """Write a checkpoint to go on from, each process its own rows. Every process must call it, on a shared file system.

    Args:
        folder: It appears when everything is written; an earlier one of this name is replaced.
        model: Sharded by `fully_shard`.
        optimizer: Of it.
        manifold_step: The handle of `attach_manifold_step`; the model must be settled.

    Raises:
        CheckpointError: The files could not be written.
        OptimizerError: The model is not settled.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # it warns where it is not used

    reshard(model)
    state: dict[str, Any] = {"manifold_step": None if manifold_step is None else manifold_step.state_dict()}
    layers = {name: StoredLayer.of(layer) for name, layer in factored_layers(model).items()}
    state["bounds"] = {name: str(layer.bound) for name, layer in layers.items()}
    target = Path(folder)
    staging = target.with_name(f"{target.name}.partial")
    parts: dict[str, dict[str, Any]] = {WEIGHTS: dict(get_model_state_dict(model))}
    if optimizer is not None:
        tensors, state["optimizer"] = _split(get_optimizer_state_dict(model, optimizer, options=_FLAT))
        parts[OPTIMIZER] = tensors
    stated = json.dumps(state)

    def begin() -> None:
        shutil.rmtree(staging, ignore_errors=True)
        for part in parts:
            (staging / part).mkdir(parents=True)

    def finish() -> None:
        (staging / STATE).write_text(stated)
        previous = target.with_name(f"{target.name}.replaced")
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
        _on_first(finish)


@torch.no_grad()
def load_sharded(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    manifold_step: ManifoldStep | None = None,
) -> None:
    """Go on where `save_sharded` wrote; every process must call it, and reads its own rows.

    Args:
        folder: What it wrote.
        model: Sharded by `fully_shard`, not necessarily over as many processes.
        optimizer: Of it; where the checkpoint has one.
        manifold_step: The handle; where the checkpoint has its state.

    Raises:
        CheckpointError: A part is missing, a tensor is missing or of another shape, or factors do not obey what the
            checkpoint states of them. The model may have been changed.
    """
    target = Path(folder)
    with _reported(target):
        state = json.loads((target / STATE).read_text())
    for name, wanted in (("optimizer", optimizer), ("manifold_step", manifold_step)):
        if wanted is not None and state.get(name) is None:
            raise CheckpointError(
                "a checkpoint must hold what is to be loaded",
                received=f"no {name} in {target}",
                remedy="Pass it to save_sharded, or do not ask for it.",
            )
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
    for name, layer in factored_layers(model).items():
        bound = float(state["bounds"].get(name, "inf"))
        stored = StoredLayer(r=layer.r, tau=layer.tau, center=layer.center, bound=bound)
        check_factors(name, (layer.U, layer.S, layer.V), stored, layer.S.dtype)
        layer.bound = bound
    if manifold_step is not None:
        manifold_step.load_state_dict(state["manifold_step"])


def _on_first(work: Callable[[], None]) -> None:
    """Let the first process do it while the others wait; where it fails, all raise its error."""
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
    """What safetensors can hold, and what JSON can."""
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
    except (OSError, ValueError, SafetensorError, CheckpointException) as error:
        raise CheckpointError(
            "a sharded checkpoint must be written and read whole",
            received=f"{folder}: {str(error).strip().splitlines()[-1]}",
            remedy="Save it with save_sharded of a model converted alike; use an earlier one if it is damaged.",
        ) from error
