"""`LowRankLayer`: what the factored layers share, that is the factors U, S, V and the constraint they obey."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_condlr.distributed.shards import full_tensor
from hf_condlr.errors import ConfigError, ConversionError, require
from hf_condlr.layers.folded import FoldedLayer
from hf_condlr.layers.inference import Builders, InferenceForm, InferenceLayer, filled
from hf_condlr.layers.pivoted import PivotedLayer
from hf_condlr.layers.weight_stand_in import stand_in
from hf_condlr.linalg import (
    CENTERS,
    ROUNDING_TOLERANCE,
    Center,
    condition_number,
    is_conditionable,
    random_factors,
    truncated_svd,
)
from hf_condlr.linalg.precision import at_least_float32, to_float64

Factors = tuple[Tensor, Tensor, Tensor]

FORMS: dict[str, type[InferenceLayer]] = {kind.form: kind for kind in (FoldedLayer, PivotedLayer)}

Factorization = Callable[[Tensor, int], Factors]  # (m, n) matrix and r -> U (m, r), S (r, r), V (n, r)


class LowRankLayer(nn.Module):
    """A layer with weight W = U S Vᵀ: parameters U, S, V and bias, and the constraint that they must obey.

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
        rule = f"the rank of a {m}×{n} weight lies in 1 … {min(m, n)}"
        require(1 <= r <= min(m, n), rule, received=f"r={r}", remedy="Choose such an r.", error=ConversionError)
        require(tau >= 0, "tau must be ≥ 0", received=tau, remedy="tau = 0.1 bounds κ by 1.1.", error=ConfigError)
        rule = f"center must be one of {', '.join(CENTERS)}"
        require(center in CENTERS, rule, received=repr(center), remedy="Choose one.", error=ConfigError)
        self.tau, self.center, self.bound = float(tau), center, math.inf
        self.U = nn.Parameter(torch.empty(m, r, **factory))
        self.S = nn.Parameter(torch.empty(r, r, **factory))
        self.V = nn.Parameter(torch.empty(n, r, **factory))
        self.register_parameter("bias", nn.Parameter(torch.empty(m, **factory)) if bias else None)

    @classmethod
    def from_dense(
        cls,
        dense: Any,
        r: int,
        *,
        factorize: Factorization = truncated_svd,
        tau: float = 0.1,
        center: Center = "nearest",
    ) -> Self:
        """Factor a dense layer; dtype, device, training mode, requires_grad and the bias parameter itself are kept.

        Args:
            dense: The layer: for `LowRankLinear` an `nn.Linear`, or GPT-2's `Conv1D`, whose weight is stored
                transposed; for `LowRankConv2d` an `nn.Conv2d`.
            r: Rank.
            factorize: The start, `(W (m, n), r) -> U, S, V`.
            tau: Conditioning tolerance.
            center: Interval of the conditioning.
        """
        W = weight_matrix(dense)
        layer = cls.empty_like(dense, r, tau=tau, center=center).to_empty(device=W.device)
        layer.set_factors(*factorize(W, r))
        for parameter in (layer.U, layer.S, layer.V):
            parameter.requires_grad_(dense.weight.requires_grad)
        layer.bias = dense.bias
        return layer.train(dense.training)

    @classmethod
    @abstractmethod
    def empty_like(cls, dense: Any, r: int, *, tau: float, center: Center) -> Self:
        """Build the layer that replaces `dense` on the meta device, without values and without a bias."""

    @abstractmethod
    def builders(self) -> Builders:
        """What builds the dense layer and the two of a form for inference."""

    def to_dense(self) -> Any:
        """Multiply the factors out to an ordinary layer of the class that this one came from."""
        build_dense, _, _ = self.builders()
        return filled(build_dense, self.matrix(), self.bias, like=self.U).train(self.training)

    def fold(self, form: InferenceForm = "folded") -> Any:
        """Two ordinary layers in place of U, S, V, for inference.

        Args:
            form: `folded` for Vᵀ and U S, r(m + n) weights; `pivoted` for r(m + n − r) of them, of which a layer of
                full rank becomes the dense one, which is as small.
        """
        US = to_float64(self.U) @ to_float64(self.S)
        return FORMS[form].of(US, self.V.mT, self.bias, self.builders(), replaced=self, like=self.U)

    @property
    def r(self) -> int:
        """The rank."""
        return self.S.shape[-1]

    @property
    def weight(self) -> Tensor:
        """A tensor without values: dtype, device and shape may be read, all else is an error; see `matrix()`."""
        return stand_in(self.U, self.weight_shape)

    def matrix(self) -> Tensor:  # (m, n)
        """Multiply out W = U S Vᵀ in at least float32."""
        U, S, V = map(at_least_float32, (self.U, self.S, self.V))
        return (U @ S @ V.mT).to(self.U.dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw orthonormal U, V and S = c Q, with c the rms singular value of torch's initialiser for such a layer."""
        m, n = self.U.shape[0], self.V.shape[0]
        rms = math.sqrt(m / (3 * min(m, n)))  # entries uniform in ±1/√n, as in nn.Linear and nn.Conv2d
        self.set_factors(*random_factors(m, n, self.r, rms, dtype=self.U.dtype, device=self.U.device))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / math.sqrt(n), 1 / math.sqrt(n))

    @torch.no_grad()
    def set_factors(self, U: Tensor, S: Tensor, V: Tensor) -> None:
        """Copy the factors in, and set `bound` accordingly."""
        for parameter, value in zip((self.U, self.S, self.V), (U, S, V), strict=True):
            parameter.copy_(value)
        self.refresh_bound()

    @torch.no_grad()
    def refresh_bound(self) -> None:
        """Set `bound` to 1 + tau if S obeys it, else to inf. A sharded S is gathered for this."""
        target = 1 + self.tau
        tolerance = 1 + ROUNDING_TOLERANCE.get(self.S.dtype, torch.finfo(self.S.dtype).eps)
        S = full_tensor(self.S)
        obeys = bool(is_conditionable(S)) and bool(condition_number(S) <= target * tolerance)
        self.bound = target if obeys else math.inf

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.S.is_meta:
            self.refresh_bound()

    def bound_repr(self) -> str:
        """The end of both layers' `extra_repr`."""
        return f"r={self.r}, bias={self.bias is not None}, tau={self.tau:g}, bound={self.bound:.4g}"


def weight_matrix(dense: nn.Module) -> Tensor:  # (m, n)
    """Return the weight of a Linear, Conv1D or Conv2d as the matrix (out, in), detached."""
    weight: Tensor = cast(Any, dense).weight.detach()
    return weight.mT if isinstance(dense, Conv1D) else weight.reshape(weight.shape[0], -1)
