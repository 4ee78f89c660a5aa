"""`to_lora`: a trained adapter as an ordinary LoRA adapter, which other software serves."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from hf_condlr.adapters.config import CondLRAdapterConfig
from hf_condlr.adapters.layer import CondLRLinear, adapted_layers
from hf_condlr.errors import ConversionError, listed, require
from hf_condlr.layers import LowRankUpdate
from hf_condlr.linalg.precision import to_float64

_PEFT_PREFIX = "base_model.model."


@torch.no_grad()
def to_lora(model: Any, adapter_name: str = "default") -> Any:
    """Turn an adapter into a LoRA adapter with the same update: B = s U S, A = Vᵀ and lora_alpha = r, to rounding.

    The result is on the same base model, as after `merge_and_unload`; the given `PeftModel` must not be used any more.
    Modules in `modules_to_save` go with it, other adapters do not. Each A and B is rounded once, to the factors' dtype.

    Examples:
        >>> to_lora(model).save_pretrained("lora")  # for PEFT without this package, vLLM, TGI, llama.cpp

    Args:
        model: A `PeftModel` with an adapter of `CondLRAdapterConfig`, not merged.
        adapter_name: Which one.

    Returns:
        A `PeftModel` with the LoRA adapter under the same name.

    Raises:
        ConversionError: The model has no such adapter, or it is merged.
    """
    config: Any = model.peft_config.get(adapter_name) if isinstance(model, PeftModel) else None
    rule, remedy = (
        "to_lora needs a PeftModel with this adapter",
        "Call peft.get_peft_model, or PeftModel.from_pretrained.",
    )
    received = f"a {type(model).__name__} and {adapter_name!r}"
    require(isinstance(config, CondLRAdapterConfig), rule, received=received, remedy=remedy, error=ConversionError)
    layers = adapted_layers(model, adapter_name)
    merged = [name for name, layer in layers.items() if layer.merged]
    rule, remedy = "the base weights must be those without an adapter", "Call model.unmerge_adapter() first."
    require(not merged, rule, received=f"merged ones in {listed(merged)}", remedy=remedy, error=ConversionError)

    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    state = {name: p.detach().clone() for name, p in state.items() if ".condlr_factors." not in name}
    for name, layer in layers.items():
        state |= _lora_matrices(name, layer.condlr_factors[adapter_name])  # type: ignore[arg-type]
    lora_config = _lora_config(model, config, adapter_name, layers)
    name_or_path, revision = config.base_model_name_or_path, config.revision
    lora = get_peft_model(model.unload(), lora_config, adapter_name=adapter_name)
    lora_config.base_model_name_or_path, lora_config.revision = name_or_path, revision
    set_peft_model_state_dict(lora, state, adapter_name=adapter_name)
    return lora.eval()


def _lora_matrices(name: str, update: LowRankUpdate) -> dict[str, Tensor]:
    """A (r, n) and B (m, r) of one layer, under the names of LoRA's checkpoints."""
    B = (update.scale * (to_float64(update.U) @ to_float64(update.S))).to(device=update.S.device, dtype=update.S.dtype)
    return {f"{name}.lora_A.weight": update.V.detach().mT.contiguous(), f"{name}.lora_B.weight": B.contiguous()}


def _lora_config(
    model: PeftModel, config: CondLRAdapterConfig, adapter_name: str, layers: dict[str, CondLRLinear]
) -> LoraConfig:
    """The config whose layers, ranks and scale 1 are those of the adapter."""
    ranks = {name.removeprefix(_PEFT_PREFIX): layer.condlr_factors[adapter_name].r for name, layer in layers.items()}
    others = {name: r for name, r in ranks.items() if r != config.r}
    return LoraConfig(
        task_type=config.task_type,
        r=config.r,
        lora_alpha=config.r,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=_short_names(model, set(ranks)),
        modules_to_save=config.modules_to_save,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
    )


def _short_names(model: PeftModel, targets: set[str]) -> list[str]:
    """The last parts of the names, such as q_proj, where they match the same modules, as servers expect them."""
    short = sorted({name.rpartition(".")[2] for name in targets})
    inside = {
        id(child) for x in model.modules() if isinstance(x, CondLRLinear) for child in x.modules() if child is not x
    }
    outside = [name for name, x in model.get_base_model().named_modules() if id(x) not in inside]
    matched = {name for name in outside if name.rpartition(".")[2] in short}
    return short if matched == targets else sorted(targets)
