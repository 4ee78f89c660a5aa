"""What the factored layers share: the factors U, S, V, the constraint they obey, and folding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_condlr.distributed.shards import full_tensor
from hf_condlr.errors import ConfigError, ConversionError
from hf_condlr.layers.weight_stand_in import FACTS, stand_in
from hf_condlr.linalg import CENTERS, ROUNDING_TOLERANCE, Center, condition_number, is_conditionable, random_factors

Factors = tuple[Tensor, Tensor, Tensor]


Factorization = Callable[[Tensor, int], Factors]  # (m, n) matrix and r -> U (m, r), S (r, r), V (n, r)


class LowRankLayer(nn.Module):
    """What the factored layers share: parameters U, S, V, bias, and the constraint they are to obey.

    Attributes:
        tau: Conditioning tolerance, κ(S) ≤ 1 + tau; may be `math.inf`.
        center: The interval singular values are clipped to, see `hf_condlr.linalg.clamp_singular_values`.
        bound: The bound on κ(S) in force: 1 + tau once S obeys it, more during a warm-up, inf before the first step
            of a layer that starts outside it.
    """

    U: nn.Parameter
    S: nn.Parameter
    V: nn.Parameter
    bias: nn.Parameter | None
    weight_shape: tuple[int, ...]

    def __init__(self, m: int, n: int, r: int, bias: bool, tau: float, center: Center, **factory: Any) -> None:
        super().__init__()
        if not 1 <= r <= min(m, n):
            raise ConversionError(
                f"the rank of a {m}×{n} weight lies in 1 … {min(m, n)}", received=f"r={r}", remedy="Choose r in it."
            )
        if not tau >= 0:
            raise ConfigError("tau must be ≥ 0", received=tau, remedy="tau = 0.1 bounds κ by 1.1.")
        if center not in CENTERS:
            rule = f"center must be one of {', '.join(CENTERS)}"
            raise ConfigError(rule, received=repr(center), remedy="Choose one.")
        self.tau, self.center, self.bound = float(tau), center, math.inf
        self.U = nn.Parameter(torch.empty(m, r, **factory))
        self.S = nn.Parameter(torch.empty(r, r, **factory))
        self.V = nn.Parameter(torch.empty(n, r, **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(m, **factory)) if bias else None)

    @property
    def r(self) -> int:
        """The rank."""
        return self.S.shape[-1]

    @property
    def weight(self) -> Tensor:
        """Answers code that asks for `weight.dtype`, `.device` or `.shape`; computing with it is an error.

        The matrix itself is `matrix()`.
        """
        return stand_in(self.U, self.weight_shape)

    def matrix(self) -> Tensor:  # (m, n)
        """W = U S Vᵀ, multiplied out in at least float32."""
        U, S, V = (p if p.dtype == torch.float64 else p.float() for p in (self.U, self.S, self.V))
        return (U @ S @ V.mT).to(self.U.dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random orthonormal U, V and S = c Q, with c the rms singular value that torch gives such a dense layer."""
        m, n = self.U.shape[0], self.V.shape[0]
        rms = math.sqrt(m / (3 * min(m, n)))  # entries uniform in ±1/√n, as in nn.Linear and nn.Conv2d
        self.set_factors(*random_factors(m, n, self.r, rms, dtype=self.U.dtype, device=self.U.device))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(n), 1 / math.sqrt(n))

    @torch.no_grad()
    def set_factors(self, U: Tensor, S: Tensor, V: Tensor) -> None:
        """Copy the factors in, and find out whether S obeys 1 + tau already."""
        for parameter, value in zip((self.U, self.S, self.V), (U, S, V), strict=True):
            parameter.copy_(value)
        self.refresh_bound()

    @torch.no_grad()
    def refresh_bound(self) -> None:
        """`bound` from S itself: 1 + tau where it obeys that, inf where it does not. Gathers a sharded S."""
        target = 1 + self.tau
        tolerance = 1 + ROUNDING_TOLERANCE.get(self.S.dtype, torch.finfo(self.S.dtype).eps)
        S = full_tensor(self.S)
        feasible = bool(is_conditionable(S)) and bool(condition_number(S) <= target * tolerance)
        self.bound = target if feasible else math.inf

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.S.is_meta:
            self.refresh_bound()

    def take_over(self, dense: Any, factors: Factors) -> None:
        """Factors of the dense layer's weight; its bias itself, training mode and requires_grad."""
        self.set_factors(*factors)
        for parameter in (self.U, self.S, self.V):
            parameter.requires_grad_(dense.weight.requires_grad)
        self.bias = dense.bias
        self.train(dense.training)

    def bound_repr(self) -> str:
        """What both layers' `extra_repr` end with."""
        return f"r={self.r}, bias={self.bias is not None}, tau={self.tau:g}, bound={self.bound:.4g}"


FACTS |= {"size", "dim", "numel", "element_size", "is_floating_point", "is_complex", "get_device", "is_quantized"}


def weight_matrix(dense: nn.Module) -> Tensor:  # (m, n)
    """The weight of a Linear, Conv1D or Conv2d as the matrix (out, in), detached."""
    weight: Tensor = cast(Any, dense).weight.detach()
    return weight.mT if isinstance(dense, Conv1D) else weight.reshape(weight.shape[0], -1)


def allocate(build: Callable[[], nn.Module], like: Tensor) -> Any:
    """A dense layer without values on the device and in the dtype of `like`; draws no random numbers."""
    with torch.device("meta"):
        layer = build()
    return layer.to(dtype=like.dtype).to_empty(device=like.device)


@torch.no_grad()
def give_weight(dense: Any, layer: LowRankLayer, weight: Tensor) -> Any:
    """Fill a fresh dense layer: weight, the bias itself, requires_grad, training mode."""
    dense.weight.copy_(weight)
    dense.weight.requires_grad_(layer.U.requires_grad)
    dense.bias = layer.bias
    return dense.train(layer.training)
