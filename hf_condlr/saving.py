"""`save_pretrained` of a factored model: the factors alone, and at every moment a whole checkpoint on the disk.

Everything is written beside the old checkpoint first. The weights come in under a name that is free; then the new
`config.json`, which names them, replaces the old one in one step; only then the old weights go. A process killed
anywhere in between leaves the old or the new checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
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
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_condlr.checkpoints import (
    INDEX_SUFFIX,
    MANIFEST,
    NOTICE,
    STEM,
    SUFFIX,
    Manifest,
    StoredLayer,
    compressed_layers,
    stored_layers,
)
from hf_condlr.errors import CheckpointError
from hf_condlr.hub import check_whole, push_to_hub
from hf_condlr.shards import is_sharded

STAGING = ".condlr-"
_SHARD = re.compile(r"(-\d{5}-of-\d{5})\.safetensors$")


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
            _publish(model, staging, folder, layers)
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


def _publish(model: PreTrainedModel, staging: Path, folder: Path, layers: dict[str, StoredLayer]) -> None:
    """Move what `staging` holds into `folder`, `config.json` last."""
    shards = sorted(p for p in staging.glob(f"*{SUFFIX}"))
    config = json.loads((staging / CONFIG_NAME).read_text(encoding="utf-8"))
    config["transformers_weights"] = NOTICE
    condlr_config = getattr(model, "condlr_config", None)
    manifest = Manifest(
        weights="",
        layers=layers,
        config=condlr_config.to_dict() if condlr_config is not None else None,
    )
    digests = {path: _digest(path) for path in shards}
    others = [p for p in staging.iterdir() if p not in shards and p.name not in (CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    index_path = staging / SAFE_WEIGHTS_INDEX_NAME
    index = json.loads(index_path.read_text(encoding="utf-8")) if index_path.is_file() else None
    for path in others:
        _flush(path)
        os.replace(path, folder / path.name)

    def point(stem: str, place: Any) -> list[str]:
        """Place the weights under names that begin with `stem`, then let `config.json` name them."""
        names = {path: _renamed(path.name, stem) for path in shards}
        for path, name in names.items():
            place(path, folder / name)
        manifest.weights = f"{stem}{SUFFIX}"
        manifest.sha256 = {names[path]: digest for path, digest in digests.items()}
        new = list(names.values())
        if index is not None:
            manifest.weights = f"{stem}{INDEX_SUFFIX}"
            places = {key: _renamed(name, stem) for key, name in index["weight_map"].items()}
            _write_json(staging, folder / manifest.weights, index | {"weight_map": places})
            new.append(manifest.weights)
        _sync(folder)
        _write_json(staging, folder / CONFIG_NAME, config | {MANIFEST: manifest.to_dict()})
        _sync(folder)
        return new

    if any(name.startswith(STEM) for name in _weights_in(folder)):
        # Under names that are free first, so that the old checkpoint stays whole; then back to the usual ones.
        _remove_others(folder, point(f"{STEM}-{secrets.token_hex(4)}", _link_or_copy))
    _remove_others(folder, point(STEM, os.replace))


def _renamed(name: str, stem: str) -> str:
    """`model-00001-of-00002.safetensors` with another beginning."""
    shard = _SHARD.search(name)
    return f"{stem}{shard.group(1) if shard else ''}{SUFFIX}"


def _weights_in(folder: Path) -> set[str]:
    """The weight files of earlier checkpoints, factored or dense."""
    dense = SAFE_WEIGHTS_NAME.removesuffix(SUFFIX)
    names = rf"({STEM}(-[0-9a-f]{{8}})?|{dense})(-\d{{5}}-of-\d{{5}})?"  # nothing else: other files are the user's
    pattern = re.compile(rf"{names}({re.escape(SUFFIX)}|{re.escape(INDEX_SUFFIX)})")
    return {path.name for path in folder.iterdir() if pattern.fullmatch(path.name)}


def _remove_others(folder: Path, kept: list[str]) -> None:
    for name in _weights_in(folder) - set(kept):
        (folder / name).unlink()


def _digest(path: Path) -> str:
    """Of the file as it lies on the disk: flushed first, so that a commit never names what is not there yet."""
    _flush(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
        _flush(target)


def _write_json(staging: Path, path: Path, values: dict[str, Any]) -> None:
    temporary = staging / f"{path.name}.tmp"
    temporary.write_text(json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)


def _flush(path: Path) -> None:
    if path.is_file():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Renames reach the disk in order; not every system lets a folder be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
