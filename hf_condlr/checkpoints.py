"""Weights of a checkpoint folder back into a model in memory, under whatever names transformers saved them.

`save_pretrained` writes some architectures (ViT among them) under legacy names. Trainer's own resume and best-model
loading does not know them: it leaves such a model half restored and only warns.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_condlr.errors import CheckpointError
from hf_condlr.layers import LowRankLayer


@torch.no_grad()
def restore_weights(model: nn.Module, folder: str | Path) -> None:
    """Copy every saved tensor into the parameter or buffer it came from; all are checked before the first is changed.

    Raises:
        CheckpointError: A file is missing or damaged, a tensor is missing, superfluous or of another shape.
    """
    places = _saved_names(model)
    files = _files(Path(folder))
    found: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
                for key in set(file.keys()) & set(places):
                    shape, expected = tuple(file.get_slice(key).get_shape()), tuple(places[key].shape)
                    if shape != expected:
                        received = f"{key} of shape {shape} for {expected}"
                        raise CheckpointError(_RULE, received=received, remedy=_REMEDY)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                "weight files must be readable", received=f"{path.name}: {error}", remedy="Use an earlier checkpoint."
            ) from error
    restored = {places[key].data_ptr() for key in found if key in places}
    missing = [key for key, tensor in places.items() if key not in found and tensor.data_ptr() not in restored]
    wrong = [f"no {key}" for key in missing] + [f"unknown {key}" for key in found if key not in places]
    if wrong:
        shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        raise CheckpointError(_RULE, received=shown, remedy=_REMEDY)
    for path in files:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # a safe_open is no mapping
                places[key].copy_(file.get_tensor(key))
    for module in model.modules():
        if isinstance(module, LowRankLayer):
            module.refresh_bound()


_RULE = "a checkpoint must hold the tensors of this model"
_REMEDY = "Build the model with the config it was saved with; nothing was loaded."


def _saved_names(model: nn.Module) -> dict[str, Tensor]:
    """{name in the file: the model's own tensor}, tied ones under all their names."""
    state = dict(model.state_dict(keep_vars=True))
    if not isinstance(model, PreTrainedModel):
        return state
    saved = revert_weight_conversion(model, state)
    # Pure renames hand the tensors through. A fusing conversion makes new ones: copying there would be lost.
    own = {id(tensor) for tensor in state.values()}
    if not all(id(tensor) in own for tensor in saved.values()):
        raise CheckpointError(
            "checkpoints of architectures that transformers splits or fuses on saving cannot be restored into a model",
            received=type(model).__name__,
            remedy="Train without resuming and without load_best_model_at_end.",
        )
    return saved


def _files(folder: Path) -> list[Path]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [folder / name for name in names]
    return [folder / SAFE_WEIGHTS_NAME]
