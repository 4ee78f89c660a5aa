"""`save_pretrained` of a factored model: the factors alone, and at every moment a whole checkpoint on the disk.

Everything is written beside the old checkpoint first. The weights come in under a name that is free; then the new
`config.json`, which names them, replaces the old one in one step; only then the old weights go. A process killed
anywhere in between leaves the old or the new checkpoint.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_condlr.checkpoints.hub import check_whole, push_to_hub
from hf_condlr.checkpoints.manifest import (
    stored_layers,
)
from hf_condlr.checkpoints.publish import STAGING, publish
from hf_condlr.distributed.shards import is_sharded
from hf_condlr.errors import CheckpointError
from hf_condlr.layers import compressed_layers


def attach_saving(model: Any) -> None:
    """Let `save_pretrained`, and what calls it (the Trainer), and `push_to_hub` write factored checkpoints.

    Attributes of the model, and of every transformers model inside it that has factors of its own (`model.bert`):
    classes stay what they are. Copies and pickles of the model keep them.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and compressed_layers(module):
            object.__setattr__(module, "save_pretrained", partial(save_pretrained, module))
            object.__setattr__(module, "push_to_hub", partial(push_to_hub, module))


def detach_saving(model: Any) -> None:
    """Back to the classes' own `save_pretrained` and `push_to_hub`."""
    for module in model.modules():
        for name in ("save_pretrained", "push_to_hub"):
            if isinstance(vars(module).get(name), partial):
                delattr(module, name)


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    token: str | bool | None = None,
    **kwargs: Any,
) -> None:
    """As `PreTrainedModel.save_pretrained`, for a model with factored or folded layers.

    Of a model that `fully_shard` sharded every process must call it; the first one gathers the weights and writes.
    `AutoModelFor….from_pretrained(save_directory)` builds the same layers after `import hf_condlr`.

    Args:
        model: The model.
        save_directory: Folder; what else lies in it stays.
        is_main_process: Others write nothing.
        state_dict: Tensors to write instead of the model's own.
        push_to_hub: Upload afterwards; `kwargs` then go to `model.push_to_hub`, with `repo_id` among them. Not of a
            sharded model.
        max_shard_size: Largest weight file.
        token: Of the Hub.
        kwargs: For the upload. What transformers takes and does not use any more (`save_function`) is taken, too.

    Raises:
        CheckpointError: The files could not be written, or an option that factored checkpoints do not have was given.
    """
    folder = Path(save_directory)
    upload = {name: kwargs.pop(name) for name in _UPLOAD & set(kwargs)}
    kwargs.pop("save_function", None)
    if refused := {name: value for name, value in kwargs.items() if value not in _HARMLESS.get(name, ())}:
        raise CheckpointError(
            "factored checkpoints have one format: safetensors with the model's own names, and no variants",
            received=", ".join(f"{name}={value!r}" for name, value in refused.items()),
            remedy="Leave it out.",
        )
    if push_to_hub:
        check_whole(model)
    if state_dict is None and is_sharded(model):
        state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        is_main_process = is_main_process and dist.get_rank() == 0  # the only one that got it
    if state_dict is not None and any(isinstance(p, DTensor) for p in state_dict.values()):
        raise CheckpointError(
            "a state_dict to be written must hold whole tensors",
            received="shards",
            remedy="Leave it out, and call save_pretrained on every process: it gathers them.",
        )
    if not is_main_process:
        return
    layers = stored_layers(model, state_dict)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_behind in folder.glob(f"{STAGING}*"):  # by a process that was killed
            shutil.rmtree(left_behind, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
        try:
            # The model's own names: legacy ones would have to be split and fused, which factors cannot be.
            tensors = None if state_dict is None else dict(state_dict)  # transformers empties it
            options: dict[str, Any] = {"state_dict": tensors, "max_shard_size": max_shard_size}
            with _gathered_already(model):
                type(model).save_pretrained(model, staging, save_original_format=False, **options)
            publish(model, staging, folder, layers)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "a checkpoint must be written whole",
            received=f"{folder}: {error}",
            remedy="What lies there is as whole as before. Free space or choose another folder, and save again.",
        ) from error
    if push_to_hub:
        repo_id = upload.pop("repo_id", folder.name)
        model.push_to_hub(repo_id, token=token, max_shard_size=max_shard_size, **upload)


@contextmanager
def _gathered_already(model: PreTrainedModel) -> Iterator[None]:
    """Where transformers itself sharded the model, it would gather again, and wait for the other processes."""
    config: Any = model.config
    distributed = getattr(config, "distributed_config", None)
    try:
        if distributed is not None:
            config.distributed_config = None
        yield
    finally:
        if distributed is not None:
            config.distributed_config = distributed


_UPLOAD = {"repo_id", "commit_message", "commit_description", "private", "create_pr", "revision", "tags"}


# What asks for nothing but the one format.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "variant": (None,),
    "save_original_format": (False,),
    "distributed_checkpoint": (False,),
    "safe_serialization": (True, None),
    "save_peft_format": (True, False),
}
