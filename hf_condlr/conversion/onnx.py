"""ONNX files of factored models: folded to two ordinary layers each, so that any runtime knows every operator."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_condlr.conversion.fold import fold_model
from hf_condlr.errors import ConversionError, MissingExtraError
from hf_condlr.files import replacing
from hf_condlr.layers import is_factored


def export_onnx(model: PreTrainedModel, path: str | Path, *, inputs: Mapping[str, Tensor] | None = None) -> Path:
    """Write the model as an ONNX graph with all weights in the one file.

    A copy is folded; the model stays as it is. The graph has the outputs of the model under their names: `logits`, or
    `start_logits` and `end_logits`, `pred_boxes` and so on. The batch size may vary and, for text, the length; a
    decoder's tokens have their own length.

    Args:
        model: Factored, folded or dense.
        path: File to write, replaced in one step.
        inputs: Example inputs of `forward`, with two samples; made up for models of `pixel_values` or `input_ids`.

    Raises:
        ConversionError: No example was given and none can be made up.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        rule, remedy = "ONNX export needs onnx and onnxscript", "pip install 'hf_condlr[onnx]'"
        raise MissingExtraError(rule, received=str(error), remedy=remedy) from error
    example = dict(inputs or _example(model))
    folded = copy.deepcopy(model).eval()
    if is_factored(folded):
        fold_model(folded)
    for module in folded.modules():  # a cache is not a tensor; a decoder may have its own config
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # its warnings concern itself and torchvision
    with replacing(path) as temporary, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        tensors_only = _TensorsOnly(folded, list(example))
        output_names = list(tensors_only.named_outputs(*example.values()))
        torch.onnx.export(
            tensors_only,
            tuple(example.values()),
            temporary,
            dynamo=True,
            external_data=False,
            input_names=list(example),
            output_names=output_names,
            dynamic_shapes=(tuple(_dynamic_axes(example)),),
            verbose=False,
        )
    return Path(path)


def _dynamic_axes(example: Mapping[str, Tensor]) -> Iterator[dict[int, Any]]:
    """For each input the axes that may vary: the batch and, for tokens and their embeddings, the length."""
    batch = torch.export.Dim("batch")
    length, decoder_length = torch.export.Dim("length"), torch.export.Dim("decoder_length")
    for name, tensor in example.items():
        is_text = tensor.dim() == 2 or name.endswith("inputs_embeds")
        yield {0: batch} | ({1: decoder_length if name.startswith("decoder_") else length} if is_text else {})


class _TensorsOnly(nn.Module):
    """Takes and returns tuples of tensors, since graphs have no dictionaries."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named_outputs(*tensors).values())

    def named_outputs(self, *tensors: Tensor) -> dict[str, Tensor]:
        """The outputs that are tensors, under the names that the model gives them."""
        output = self.model(**dict(zip(self.names, tensors, strict=True)))
        if not isinstance(output, Mapping):
            output = {f"output_{i}": x for i, x in enumerate((output,) if isinstance(output, Tensor) else output)}
        return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def _example(model: PreTrainedModel) -> dict[str, Any]:
    """Two samples: a batch of one would be taken for a constant."""
    name = model.main_input_name
    parameter = next(model.parameters())
    size = getattr(model.config, "image_size", None)
    if name == "pixel_values" and size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(model.config, "num_channels", 3)
        return {name: torch.rand(2, channels, height, width, dtype=parameter.dtype, device=parameter.device)}
    is_pair = model.config.is_encoder_decoder
    if name == "input_ids" and (not is_pair or model.can_generate()):
        ids, mask, target = torch.ones(3, 2, 8, dtype=torch.int64, device=parameter.device)
        return {name: ids, "attention_mask": mask} | ({"decoder_input_ids": target[:, :6]} if is_pair else {})
    raise ConversionError(
        "an example of the model's inputs is needed for the export",
        received=f"a {type(model).__name__}, which takes {name}",
        remedy="Pass inputs={...} with two samples.",
    )
