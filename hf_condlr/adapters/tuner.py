"""`CondLRAdapterModel`: PEFT's tuner, which puts updates into a model and verifies those that are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from hf_condlr.adapters.layer import CondLRLinear
from hf_condlr.adapters.registration import PREFIX
from hf_condlr.adapters.verify import check_adapter, warn_of_broken_bounds
from hf_condlr.errors import ConversionError, require


class CondLRAdapterModel(BaseTuner):
    """The base model with updates beside its linear layers; made by `peft.get_peft_model`."""

    prefix = PREFIX
    tuner_layer_cls = CondLRLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # as BaseTuner declares it

    def _create_and_replace(
        self,
        peft_config: Any,  # a CondLRAdapterConfig
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        key = get_pattern_key(list(peft_config.rank_pattern), current_key)
        r = peft_config.rank_pattern.get(key, peft_config.r)
        layer = target if isinstance(target, CondLRLinear) else self._wrapped(target, current_key)
        full, remedy = min(layer.shape), f"Give it a rank in rank_pattern, or put {target_name} into exclude_modules."
        require(
            r <= full,
            f"the rank of {current_key} lies in 1 … {full}",
            received=f"r={r}",
            remedy=remedy,
            error=ConversionError,
        )
        layer.update_layer(adapter_name, r=r, tau=peft_config.tau, scale=peft_config.scale)
        if layer is not target:
            layer.set_adapter(self.active_adapters)
            self._replace_module(parent, target_name, layer, target)

    def _wrapped(self, target: nn.Module, name: str) -> CondLRLinear:
        """A layer around `target`, which must be linear and called by its model."""
        try:
            backend = resolve_quantization_backend(target, **get_quantization_kwargs(self.model))
        except ValueError:  # torchao's quantize_ in memory: PEFT does not know how to quantize a merged weight
            backend = ForwardOnlyQuantizationBackend("torchao, without TorchAoConfig,")
        is_linear = isinstance(target, (nn.Linear, Conv1D)) or (backend is not None and backend.layer_type == "linear")
        if not is_linear or isinstance(target, NonDynamicallyQuantizableLinear):
            raise ConversionError(
                "an adapter needs a linear layer (nn.Linear, Conv1D or a quantized one) that its model calls",
                received=f"{name}, a {type(target).__name__}",
                remedy="Put it in exclude_modules. Of a compressed model adapt the dense layers, or train the factors.",
            )
        return CondLRLinear(target, backend)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse batches of several adapters, which PEFT would otherwise run with the active one."""
        if kwargs.get("adapter_names") is not None:
            raise ConversionError(
                "all samples of a batch must use the active adapters",
                received="adapter_names",
                remedy="Convert the adapters by to_lora: PEFT mixes LoRA adapters in a batch.",
            )
        yield

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        warn_of_broken_bounds(model, adapter_name)
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        tensors = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_adapter(model, adapter_name, tensors)
        return tensors
