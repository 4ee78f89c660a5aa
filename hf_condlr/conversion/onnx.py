"""ONNX files of factored models: folded to two ordinary layers each, so that any runtime knows every operator."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_condlr.conversion.fold import fold_model
from hf_condlr.errors import ConversionError, MissingExtraError
from hf_condlr.files import replacing
from hf_condlr.layers import factored_layers


def export_onnx(model: PreTrainedModel, path: str | Path, *, inputs: Mapping[str, Tensor] | None = None) -> Path:
    """Write the model's logits (or first output) as an ONNX graph with all weights in the one file.

    A copy is folded; the model stays as it is. Batch size and, for text, length may vary.

    Args:
        model: Factored, folded or dense.
        path: File to write, replaced in one step.
        inputs: Example of what `forward` gets; made up where the model takes `pixel_values` or `input_ids`.

    Raises:
        ConversionError: No example was given and none can be made up.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "ONNX export needs onnx and onnxscript", received=str(error), remedy="pip install 'hf_condlr[onnx]'"
        ) from error
    example = dict(inputs or _example(model))
    folded = copy.deepcopy(model).eval()
    if factored_layers(folded):
        fold_model(folded)
    if getattr(folded.config, "use_cache", False):
        folded.config.use_cache = False  # a cache is an object, no tensor
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    shapes = {name: {0: batch, 1: length} if x.dim() == 2 else {0: batch} for name, x in example.items()}
    # The exporter's own words about itself, and about torchvision, which it could export too.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with replacing(path) as temporary, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Logits(folded, list(example)),
            tuple(example.values()),
            temporary,
            dynamo=True,
            external_data=False,
            input_names=list(example),
            output_names=["logits"],
            dynamic_shapes=(tuple(shapes.values()),),
            verbose=False,
        )
    return Path(path)


class _Logits(nn.Module):
    """Tensors in, a tensor out: graphs have no dictionaries."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> Tensor:
        output = self.model(**dict(zip(self.names, tensors, strict=True)))
        return output.logits if "logits" in output else output[0]


def _example(model: PreTrainedModel) -> dict[str, Any]:
    """Two samples: a batch of one would be taken for a constant."""
    name = model.main_input_name
    parameter = next(model.parameters())
    size = getattr(model.config, "image_size", None)
    if name == "pixel_values" and size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(model.config, "num_channels", 3)
        return {name: torch.rand(2, channels, height, width, dtype=parameter.dtype, device=parameter.device)}
    if name == "input_ids" and not model.config.is_encoder_decoder:
        ids = torch.ones(2, 8, dtype=torch.int64, device=parameter.device)
        return {name: ids, "attention_mask": torch.ones_like(ids)}
    raise ConversionError(
        "an example of the model's inputs is needed for the export",
        received=f"a {type(model).__name__}, which takes {name}",
        remedy="Pass inputs={...} with two samples.",
    )
