"""`save_pretrained` of a factored model: only the factors, and at any time a complete checkpoint on the disk.

Everything is written next to the old checkpoint first. The weights get an unused name; then the new
`config.json`, which names them, replaces the old one in one step; only then are the old weights removed. A process
killed anywhere in between leaves the old or the new checkpoint. Writers into one folder wait for one another.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.constants import REPOCARD_NAME
from peft import PeftModel
from safetensors import SafetensorError
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from hf_condlr.checkpoints.hub import push_to_hub as upload
from hf_condlr.checkpoints.hub import refuse_sharded
from hf_condlr.checkpoints.manifest import Manifest, stored_layers
from hf_condlr.checkpoints.publish import STAGING, publish, remove_leftovers
from hf_condlr.distributed.shards import is_sharded
from hf_condlr.errors import CheckpointError, listed, require
from hf_condlr.files import alone_in
from hf_condlr.layers import compressed_layers, conversion_record

_UPLOAD = {"repo_id", "commit_message", "commit_description", "private", "create_pr", "revision", "tags"}
_HARMLESS: Any = {"variant": [None], "save_original_format": [False], "distributed_checkpoint": [False]}
_HARMLESS |= {"safe_serialization": [True, None], "save_peft_format": [True, False]}
"""Options of transformers with the values that ask for the one format that there is."""


def attach_saving(model: Any) -> None:
    """Let `save_pretrained`, its callers (the Trainer) and `push_to_hub` write factored checkpoints.

    They become attributes of the model, and of every transformers model inside it that has its own factors
    (`model.bert`); no class is changed. Copies and pickles of the model keep them.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and compressed_layers(module):
            object.__setattr__(module, "save_pretrained", partial(save_pretrained, module))
            object.__setattr__(module, "push_to_hub", partial(upload, module))
    if isinstance(model, PeftModel) and compressed_layers(model):
        for name in ("save_pretrained", "push_to_hub"):
            object.__setattr__(model, name, _refuse_adapter_only)


def _refuse_adapter_only(*args: Any, **kwargs: Any) -> None:
    raise CheckpointError(
        "a PeftModel saves its adapter only, and would lose what its factored layers learnt",
        received="a PeftModel with factored layers",
        remedy="Call model = model.merge_and_unload(), then model.save_pretrained(folder).",
    )


def detach_saving(model: Any) -> None:
    """Back to the classes' own `save_pretrained` and `push_to_hub`."""
    for module in model.modules():
        for name in ("save_pretrained", "push_to_hub"):
            vars(module).pop(name, None)


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
    """Save like `PreTrainedModel.save_pretrained`, for a model with factored or folded layers.

    For a model that `fully_shard` sharded every process must call it; the first one gathers the weights and writes.

    Args:
        model: The model.
        save_directory: Folder to write into; its other files are kept.
        is_main_process: False on processes that write nothing.
        state_dict: Tensors to write instead of the model's own.
        push_to_hub: Upload afterwards by `model.push_to_hub`, with the folder's own model card where it has one.
        max_shard_size: Largest weight file.
        token: Access token for the Hub.
        kwargs: Options of the upload.

    Raises:
        CheckpointError: The files could not be written, or an option that factored checkpoints do not have was given.
    """
    folder = Path(save_directory)
    upload_options = {name: kwargs.pop(name) for name in _UPLOAD & set(kwargs)}
    kwargs.pop("save_function", None)  # accepted by transformers, and without effect
    _refuse(model, kwargs)
    if push_to_hub:
        refuse_sharded(model)
    if state_dict is None and is_sharded(model):
        state_dict = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        is_main_process = is_main_process and dist.get_rank() == 0  # the only one that got it
    are_full = state_dict is None or not any(isinstance(p, DTensor) for p in state_dict.values())
    rule = "a state_dict to be written must hold full tensors"
    remedy = "Leave it out, and call save_pretrained on every process: it gathers them."
    require(are_full, rule, received="shards", remedy=remedy, error=CheckpointError)
    if not is_main_process:
        return
    manifest = Manifest("", stored_layers(model, state_dict), config=conversion_record(model).config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with alone_in(folder):
            _write(model, folder, manifest, state_dict, max_shard_size)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            "a checkpoint must be written completely",
            received=f"{folder}: {error}",
            remedy="A checkpoint that lies there is as complete as before. Free space or choose another folder.",
        ) from error
    if push_to_hub:
        card = folder / REPOCARD_NAME
        options: dict[str, Any] = {"token": token, "max_shard_size": max_shard_size} | upload_options
        upload(model, options.pop("repo_id", folder.name), card=card if card.is_file() else None, **options)


def _refuse(model: Any, options: dict[str, Any]) -> None:
    refused = {name: value for name, value in options.items() if value not in _HARMLESS.get(name, ())}
    rule = "factored checkpoints have one format: safetensors with the model's own names, and no variants"
    found = ", ".join(f"{name}={value!r}" for name, value in refused.items())
    require(not refused, rule, received=found, remedy="Leave it out.", error=CheckpointError)
    rule, found = "a factored checkpoint holds the model and no adapters", "a model with adapters of PEFT"
    remedy = "Save model.get_adapter_state_dict() apart, and remove them with model.delete_adapter(name)."
    has_adapters = getattr(model, "_hf_peft_config_loaded", False)
    require(not has_adapters, rule, received=found, remedy=remedy, error=CheckpointError)
    parameters = model.named_parameters()
    quantized = [n for n, p in parameters if is_traceable_wrapper_subclass(p) and not isinstance(p, DTensor)]
    rule, found = "a factored checkpoint holds floating-point weights", f"a quantized {listed(quantized)}"
    remedy = "Save the model before you quantize it, and quantize it again after loading."
    require(not quantized, rule, received=found, remedy=remedy, error=CheckpointError)


def _write(model: PreTrainedModel, folder: Path, manifest: Manifest, state_dict: Any, max_shard_size: Any) -> None:
    remove_leftovers(folder)
    # The model's own names: legacy ones would have to be split and fused, which factors cannot be.
    options: dict[str, Any] = {"save_original_format": False, "max_shard_size": max_shard_size}
    options["state_dict"] = None if state_dict is None else dict(state_dict)  # transformers empties it
    with tempfile.TemporaryDirectory(prefix=STAGING, dir=folder, ignore_cleanup_errors=True) as staging:
        with _gathered_already(model):
            type(model).save_pretrained(model, staging, **options)
        publish(Path(staging), folder, manifest, _tying(model))


def _tying(model: PreTrainedModel) -> dict[str, Any]:
    """Whether head and embeddings share a weight, as they are: the config of a model untied in memory may not know."""
    outputs = model.get_output_embeddings()
    if outputs is None or not getattr(model.config, "tie_word_embeddings", False):
        return {}
    # Offloaded weights are on the meta device, where tied ones are no more the same.
    tied = isinstance(outputs, nn.Linear) and outputs.weight is model.get_input_embeddings().weight
    return {} if tied or outputs.weight.is_meta else {"tie_word_embeddings": False}


@contextmanager
def _gathered_already(model: PreTrainedModel) -> Iterator[None]:
    """Hide that transformers sharded the model itself: it would gather again, and wait for the other processes."""
    config: Any = model.config
    distributed = getattr(config, "distributed_config", None)
    try:
        if distributed is not None:
            config.distributed_config = None
        yield
    finally:
        if distributed is not None:
            config.distributed_config = distributed
