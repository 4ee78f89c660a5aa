"""`from_pretrained` of a factored checkpoint: transformers' own extension point, which builds layers before weights.

Importing this module registers the method "condlr" of `quantization_config`. A loaded model is like a converted one:
nothing of transformers' quantization stays on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils import CONFIG_NAME
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_condlr.checkpoints import METHOD
from hf_condlr.checkpoints.manifest import PARTS, Manifest, StoredLayer
from hf_condlr.checkpoints.save import attach_saving
from hf_condlr.checkpoints.verify import (
    FACTOR_DTYPES,
    FETCH,
    Header,
    check_factors,
    check_order,
    read_headers,
    require_regular_files,
    verify_files,
)
from hf_condlr.errors import CheckpointError, listed, require
from hf_condlr.layers import (
    ConversionRecord,
    LowRankConv2d,
    LowRankLinear,
    PivotedLayer,
    compressed_layers,
    head_names,
    replace_modules,
    set_conversion_record,
    weight_matrix,
)
from hf_condlr.layers.model import loaded_factors

_SAVED_CONFIG = f"Load it with the {CONFIG_NAME} it was saved with."

for _registered in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
    _registered.pop(METHOD, None)  # importlib.reload registers again


@register_quantization_config(METHOD)
class FactoredCheckpointConfig(QuantizationConfigMixin):
    """The manifest of a checkpoint, in the form that transformers hands from `config.json` to the quantizer."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' own are an enum of strings
        self.manifest = Manifest.from_dict({"quant_method": METHOD} | values)

    def to_dict(self) -> dict[str, Any]:
        return self.manifest.to_dict()


@register_quantizer(METHOD)
class FactoredCheckpointLoader(HfQuantizer):
    """Builds the factored layers on the meta device; transformers then fills them like any others."""

    requires_calibration = True  # there is nothing to quantize on the fly: such a config for a dense model is an error
    is_trainable = is_qat_trainable = is_compileable = True

    def __init__(self, quantization_config: FactoredCheckpointConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.manifest = quantization_config.manifest
        self._loaded: dict[str, tuple[str, StoredLayer, torch.dtype]] = {}
        self._new_heads: list[str] = []

    def update_attn_implementation(self, config: Any) -> Any:
        """Called with the config before weight files are looked for: gives them their real name."""
        folder = Path(getattr(config, "_name_or_path", "") or "")
        if folder.is_dir():
            require_regular_files(folder, self.manifest)
        config.transformers_weights = self.manifest.weights
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        files = [Path(file) for file in checkpoint_files or []]
        verify_files(files, self.manifest)
        tensors = read_headers(files)
        _check_factors_stated(self.manifest, tensors)
        replacements = {}
        for stored_name, name in _places(model, self.manifest).items():
            stored = self.manifest.layers[stored_name]
            dense = model.get_submodule(name)
            layer = _empty_layer(dense, stored)
            if _fits(layer, stored_name, tensors):
                replacements[dense] = layer
                if stored.form == "factored":
                    self._loaded[name] = (stored_name, stored, FACTOR_DTYPES[tensors[f"{stored_name}.S"][1]])
                continue
            rule = "a stored layer must have the shape of the layer it stands for"
            found = f"{_shapes(stored_name, stored, tensors)} for {name} of {tuple(weight_matrix(dense).shape)}"
            require(name in head_names(model), rule, received=found, remedy=_SAVED_CONFIG, error=CheckpointError)
            self._new_heads.append(name)  # for other labels: dense and newly initialised, as transformers reports
        replace_modules(model, replacements)
        _check_kinds(model, tensors)
        if _is_saved_class(model):
            self._refuse_missing(model)

    def _refuse_missing(self, model: Any) -> None:
        """Let the loading fail where transformers would draw a missing tensor at random and only warn."""
        adjust = model._adjust_missing_and_unexpected_keys

        def adjust_and_check(loading_info: Any) -> None:
            adjust(loading_info)
            missing = sorted(k for k in loading_info.missing_keys if k.rpartition(".")[0] not in self._new_heads)
            rule = "a checkpoint must hold every tensor of the model it was saved from"
            require(not missing, rule, received=f"none for {listed(missing)}", remedy=FETCH, error=CheckpointError)

        object.__setattr__(model, "_adjust_missing_and_unexpected_keys", adjust_and_check)

    def postprocess_model(self, model: Any, **kwargs: Any) -> Any:
        """Check what was loaded, and leave an ordinary model."""
        vars(model).pop("_adjust_missing_and_unexpected_keys", None)
        for name, (stored_name, stored, dtype) in self._loaded.items():
            check_factors(stored_name, loaded_factors(model, name), stored, dtype)
            model.get_submodule(name).bound = stored.bound
        for name, layer in compressed_layers(model).items():
            if isinstance(layer, PivotedLayer):
                check_order(name, layer.order)
        self.remove_quantization_config(model)
        del model.config.transformers_weights
        set_conversion_record(model, ConversionRecord(self.manifest.config))
        attach_saving(model)
        return model

    def is_serializable(self) -> bool:
        return True


def _is_saved_class(model: Any) -> bool:
    return type(model).__name__ in (getattr(model.config, "architectures", None) or ())


def _places(model: Any, manifest: Manifest) -> dict[str, str]:
    """{name in the files: name of the module in this model}, by transformers' rules for renamed and prefixed keys."""
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    modules = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D, nn.Conv2d))}
    prefix = model.base_model_prefix + "."
    found = {}
    for stored_name in manifest.layers:
        renamed = rename_source_key(f"{stored_name}.U", renamings, [])[0].removesuffix(".U")
        candidates = [n for base in (stored_name, renamed) for n in (base, base.removeprefix(prefix), prefix + base)]
        place = next((name for name in candidates if name in modules), None)
        if place is not None:
            found[stored_name] = place
    lost = [name for name in manifest.layers if name not in found]
    if not _is_saved_class(model) and found:  # a head has no place in the base model
        lost = [name for name in lost if name.startswith(prefix)]
    rule = f"the factored layers of a checkpoint must exist in the {type(model).__name__} that is loaded"
    remedy = f"Load it with the class it was saved with, or its base model; this one has {listed(sorted(modules))}."
    require(found and not lost, rule, received=f"no place for {listed(lost)}", remedy=remedy, error=CheckpointError)
    return found


def _empty_layer(dense: Any, stored: StoredLayer) -> nn.Module:
    cls: Any = LowRankConv2d if isinstance(dense, nn.Conv2d) else LowRankLinear
    m, n = weight_matrix(dense).shape
    layer = cls.empty_like(dense, min(stored.r, m, n), tau=stored.tau, center=stored.center)
    layer.bias = dense.bias
    layer.train(dense.training)
    return layer if stored.form == "factored" else layer.fold(stored.form)


def _fits(layer: nn.Module, stored_name: str, tensors: Header) -> bool:
    return all(
        f"{stored_name}.{part}" in tensors and tensors[f"{stored_name}.{part}"][0] == tuple(tensor.shape)
        for part, tensor in layer.state_dict().items()
    )


def _check_factors_stated(manifest: Manifest, tensors: Header) -> None:
    """Check that the files hold the factors of each layer with the rank that the manifest states, and no others."""
    wrong = []
    for name, stored in manifest.layers.items():
        keys = [f"{name}.{part}" for part in PARTS[stored.form]]
        if missing := [key for key in keys if key not in tensors]:
            wrong += [f"no {key}" for key in missing]
            continue
        shapes = [tensors[key][0] for key in keys]
        dtypes = {tensors[key][1] for key in keys if not key.endswith(".order")}  # which holds integers
        # U (m, r), S (r, r), V (n, r); down (r, n), up (m, r) or pivoted (m − r, r), of convolutions with further ones
        ranks = [shape[1:2] for shape in shapes] if stored.form == "factored" else [shapes[0][:1], shapes[1][1:2]]
        if set(ranks) != {(stored.r,)}:
            wrong.append(f"r={stored.r} for {name} with {_shapes(name, stored, tensors)}")
        if not dtypes <= set(FACTOR_DTYPES):
            wrong.append(f"{name} of {', '.join(sorted(dtypes))}")
    factors = {name.removesuffix(".S") for name in tensors if name.endswith(".S")}
    wrong += [f"unknown factors {name}" for name in sorted(factors - set(manifest.layers))]
    rule = f"the factors must be those that {CONFIG_NAME} states, of dtype {', '.join(FACTOR_DTYPES)}"
    require(not wrong, rule, received=listed(wrong), remedy=f"{FETCH} {_SAVED_CONFIG}", error=CheckpointError)


def _check_kinds(model: nn.Module, tensors: Header) -> None:
    """Check that floating-point weights load from floating-point ones: a cast drops imaginary parts with a warning."""
    wrong = [
        f"{name} in {tensors[name][1]}"
        for name, p in model.state_dict().items()
        if name in tensors and p.is_floating_point() != tensors[name][1].startswith(("F", "BF"))
    ]
    rule = "a stored tensor must be floating-point where the model's is, and only there"
    require(not wrong, rule, received=listed(wrong), remedy=FETCH, error=CheckpointError)


def _shapes(name: str, stored: StoredLayer, tensors: Header) -> str:
    return ", ".join(f"{part} {tensors[key][0]}" for part in PARTS[stored.form] if (key := f"{name}.{part}") in tensors)
