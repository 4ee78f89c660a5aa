"""Which parameters of a converted model train."""

from __future__ import annotations

import logging
import re

from torch import nn

from hf_condlr.config import CondLRConfig
from hf_condlr.layers import LowRankLayer, head_names

logger = logging.getLogger(__name__)


def set_trainable(model: nn.Module, config: CondLRConfig) -> None:
    """Set `requires_grad` as `trainable` and `modules_to_save` ask; warn if the head is frozen."""
    saved = {
        name: module
        for name, module in model.named_modules()
        if any(saves(key, name) for key in config.modules_to_save or [])
    }
    if config.trainable == "factors":
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, LowRankLayer):
                module.requires_grad_(True)
        heads = [name for name in sorted(head_names(model)) if name not in saved]
        if frozen := [name for name in heads if not model.get_submodule(name).weight.requires_grad]:
            logger.warning("the head %s is frozen; modules_to_save=%s trains it", ", ".join(frozen), frozen)
    for module in saved.values():
        module.requires_grad_(True)


def saves(key: str, name: str) -> bool:
    """PEFT's rule for modules_to_save: the key is the name of the module, of a parent of it, or the end of either."""
    return re.match(rf"(^|.*\.){key}($|\..*)", name) is not None
