"""Lets PEFT put LoRA on factored and folded layers, from the import of PEFT on, and without importing it.

PEFT has a registry of layer types, one for each `LoraConfig`. It is filled when PEFT prepares a model that has such
layers, so that nobody has to; other models and other methods of PEFT see no difference.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from hf_condlr.after_import import after_import


def register_lora() -> None:
    """Do so now, or when PEFT's LoRA is imported; called again it does nothing."""
    after_import("peft.tuners.lora.model", _add_layers)


def _add_layers(module: Any) -> None:
    prepare = module.LoraModel._prepare_model
    if hasattr(prepare, "__wrapped__"):
        return

    @wraps(prepare)
    def prepare_with_factors(self: Any, peft_config: Any, model: Any) -> None:
        from hf_condlr.adapters.lora_on_factors import prepare_lora

        prepare_lora(peft_config, model)
        prepare(self, peft_config, model)

    module.LoraModel._prepare_model = prepare_with_factors
