"""LoRA on compressed layers: y = U S Vᵀ x + b + s B A x, through PEFT's own code."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, NoReturn, cast

import torch
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_adapters_to_merge
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_condlr.distributed.sharded_linalg import orthonormalize
from hf_condlr.errors import ConversionError, listed, require
from hf_condlr.layers import InferenceLayer, LowRankConv2d, LowRankLinear, compressed_layers
from hf_condlr.linalg import robust_svd
from hf_condlr.linalg.precision import to_float64

STARTS = (True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that do not read the weight of the layer."""
UNSUPPORTED = ("target_parameters", "layer_replication")


def prepare_lora(config: Any, model: nn.Module) -> None:
    """Let a `LoraConfig` find the factored and folded layers of a model; leave other configs and models alone.

    Args:
        config: The config of the adapter that PEFT is about to inject.
        model: The model.

    Raises:
        ConversionError: The config asks for what these layers cannot do.
    """
    layers = compressed_layers(model)
    if not layers or config.peft_type != "LORA":
        return
    variants = [name for name, field in config.__dataclass_fields__.items() if field.metadata.get("is_lora_variant")]
    asked = [name for name in (*variants, *UNSUPPORTED) if getattr(config, name)]
    if config.init_lora_weights not in STARTS:
        asked.append(f"init_lora_weights={config.init_lora_weights!r}")
    rule = "LoRA on factored layers is plain: y + s B A x, started without reading their weight"
    remedy = f"Leave it out; init_lora_weights may be one of {', '.join(map(repr, STARTS))}."
    require(not asked, rule, received=listed(asked), remedy=remedy, error=ConversionError)
    config._register_custom_module(
        {LowRankLinear: LoraOnFactors, InferenceLayer: _lora_for_inference, LowRankConv2d: _refuse_convolution}
    )
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = _all_linear(config, model, layers)


def _all_linear(config: Any, model: Any, layers: dict[str, Any]) -> set[str]:
    """What PEFT means by it, with a compressed layer in place of its parts, and heads left out as PEFT does."""
    expanded: Any = _maybe_include_all_linear_layers(copy.copy(config), model)
    heads = [get() for get in [getattr(model, "get_output_embeddings", None)] if get is not None]
    if heads in ([], [None]) and config.task_type == "SEQ_CLS":
        heads = [head for name in SEQ_CLS_HEAD_NAMES if (head := getattr(model, name, None)) is not None][:1]
    linear = {
        name
        for name, layer in layers.items()
        if (isinstance(layer, LowRankLinear) or (isinstance(layer, InferenceLayer) and isinstance(layer.up, nn.Linear)))
        and layer not in heads
    }
    return linear | {name for name in expanded.target_modules if name.rpartition(".")[0] not in layers}


class LoraOnFactors(Linear):
    """PEFT's LoRA on a factored or folded linear layer; merging makes a new layer.

    The factors may train, too, under the manifold step.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = False  # also where the layer came from a Conv1D, which stores its weight transposed

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: U S Vᵀ + s B A has a higher rank, so there is no place to add it to."""
        raise ConversionError(
            "adapters cannot be merged into U, S, V in place and taken out again",
            received=f"merge_adapter() on {type(self.get_base_layer()).__name__}",
            remedy="Call model = model.merge_and_unload(), which makes layers of a higher rank.",
        )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The layer without adapters, or with `merge` a new one with W = U S Vᵀ + s B A, exact to rounding.

        Called by PEFT's `unload` and `merge_and_unload`; values that are not finite are an error in any case.
        """
        base: Any = self.get_base_layer()
        lora_A, lora_B = cast(dict[str, Any], self.lora_A), cast(dict[str, Any], self.lora_B)
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in lora_A] if merge else []
        if not isinstance(base, (LowRankLinear, InferenceLayer)):  # it was made dense under its adapters
            self.fan_in_fan_out = isinstance(base, Conv1D)
            super().merge(safe_merge, names)
        if not names or not isinstance(base, (LowRankLinear, InferenceLayer)):
            return base
        B = torch.cat([to_float64(self.scaling[name] * lora_B[name].weight.detach()) for name in names], 1)
        A = torch.cat([to_float64(lora_A[name].weight.detach()) for name in names], 0)
        bias: Any = base.bias
        for name in names:
            if self.lora_bias[name]:
                rule, remedy = "merging a lora_bias needs a layer with a bias", "Train with lora_bias=False."
                require(bias is not None, rule, received="none", remedy=remedy, error=ConversionError)
                added = self.scaling[name] * lora_B[name].bias.detach()
                bias = nn.Parameter((bias.detach() + added).to(bias.dtype), requires_grad=bias.requires_grad)
        if isinstance(base, LowRankLinear):
            return _factored_sum(base, B, A, bias).train(base.training)
        return _inference_sum(base, B, A, bias)


def _factored_sum(base: LowRankLinear, B: Tensor, A: Tensor, bias: Any) -> LowRankLinear:  # (m, k), (k, n)
    """The layer of W + BA with the least rank that loses nothing but rounding, at most r + k.

    [U B] blockdiag(S, I) [V Aᵀ]ᵀ = W + BA; QR of the outer matrices and an SVD of what is left between them. The bound
    on κ is no longer in force.
    """
    U, S, V = (to_float64(factor.detach()) for factor in (base.U, base.S, base.V))
    core = torch.block_diag(S, torch.eye(len(A), dtype=S.dtype, device=S.device))
    Q_U, core, Q_V = orthonormalize(torch.cat((U, B), 1), core, torch.cat((V, A.mT), 1))
    P, sigma, Qh = robust_svd(core)
    lost = max(torch.finfo(base.S.dtype).eps / 4, len(sigma) * torch.finfo(sigma.dtype).eps)  # in rounding
    r = int((sigma > lost * sigma[0]).sum())
    with torch.device("meta"):
        dense = base.builders()[0]().to(base.S.dtype)
    layer = LowRankLinear.empty_like(dense, max(r, 1), tau=base.tau, center=base.center)
    layer = layer.to_empty(device=base.U.device)
    layer.set_factors(Q_U @ P[:, : layer.r], torch.diag(sigma[: layer.r]), Q_V @ Qh[: layer.r].mT)
    for name in "USV":
        getattr(layer, name).requires_grad_(getattr(base, name).requires_grad)
    layer.bias = bias
    return layer


def _inference_sum(base: InferenceLayer, B: Tensor, A: Tensor, bias: Any) -> nn.Module:  # (m, k), (k, n)
    """The layer of W + BA with rank r + k: [L B] [R; A] with W = L R."""
    L, R = map(to_float64, base.values())
    builders = base.build_dense, partial(nn.Linear, R.shape[1], bias=False), partial(nn.Linear, bias=False)
    L, R = torch.cat((L, B), 1), torch.cat((R, A), 0)
    return type(base).of(L, R, bias, builders, replaced=base, like=base.down.weight)


def _lora_for_inference(target: Any, adapter_name: str, **kwargs: Any) -> nn.Module:
    if isinstance(target.up, nn.Linear):
        return LoraOnFactors(target, adapter_name, **kwargs)
    _refuse_convolution(target, adapter_name)


def _refuse_convolution(target: Any, adapter_name: str, **kwargs: Any) -> NoReturn:
    raise ConversionError(
        "LoRA sits on linear layers, and on the two convolutions of a folded one",
        received=f"a {type(target).__name__} of a convolution as a target",
        remedy="Leave it out of target_modules, or call fold_model(model) and name its 'down' and 'up'.",
    )
