"""What a training is gone on from: weights as safetensors, all other state as tensors and plain numbers.

A checkpoint is a folder that takes its name when it is whole, and the one before it goes only then: a process killed
at any moment leaves one to go on from.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_condlr.files import replacing

WEIGHTS, STATE = "model.safetensors", "state.pt"


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    stateful: Mapping[str, Any],
    generators: Mapping[str, torch.Generator],
    losses: list[float | None],
    seconds: float,
) -> None:
    """After an epoch; `stateful` are optimizer, schedule, and what else has a `state_dict`."""
    temporary, final = folder / ".checkpoint", folder / f"checkpoint-{len(losses)}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_weights(temporary / WEIGHTS, model)
    state = {
        "losses": losses,
        "seconds": seconds,
        "stateful": {name: part.state_dict() for name, part in stateful.items()},
        "generators": {name: generator.get_state() for name, generator in generators.items()},
        "random": torch.get_rng_state(),
    }
    torch.save(state, temporary / STATE)
    os.replace(temporary, final)
    for old in checkpoints(folder):
        if old != final:
            shutil.rmtree(old)


def load_checkpoint(
    folder: Path, model: nn.Module, stateful: Mapping[str, Any], generators: Mapping[str, torch.Generator]
) -> tuple[list[float | None], float]:
    """Losses of the epochs done and seconds spent; nothing where there is no checkpoint."""
    found = checkpoints(folder)
    if not found:
        return [], 0.0
    load_weights(found[-1] / WEIGHTS, model)
    state = torch.load(found[-1] / STATE, weights_only=True)
    for name, part in stateful.items():
        part.load_state_dict(state["stateful"][name])
    for name, generator in generators.items():
        generator.set_state(state["generators"][name])
    torch.set_rng_state(state["random"])
    return state["losses"], state["seconds"]


def checkpoints(folder: Path) -> list[Path]:
    """The whole ones, by their epoch."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


def remove_checkpoints(folder: Path) -> None:
    """Once the training is over."""
    for path in [*checkpoints(folder), folder / ".checkpoint"]:
        shutil.rmtree(path, ignore_errors=True)


def save_weights(path: Path, model: nn.Module) -> None:
    """The state dict, in one step."""
    with replacing(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, temporary)


def load_weights(path: Path, model: nn.Module) -> None:
    """What `save_weights` wrote."""
    model.load_state_dict(load_file(path))


def write_text(path: Path, text: str) -> None:
    """In one step."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
