"""Start the bases of an adapter from a gradient, in place of random ones."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_condlr.adapters.layer import CondLRLinear, adapted_layers
from hf_condlr.errors import ConversionError, listed, require
from hf_condlr.layers import LowRankUpdate
from hf_condlr.layers.update import START
from hf_condlr.linalg import retract_qr

logger = logging.getLogger(__name__)


def start_from_gradient(
    model: nn.Module, train_step: Callable[[], object], *, adapter_name: str = "default"
) -> dict[str, float]:
    """Let U and V of a fresh adapter span the r leading singular vectors of ∇L(W₀) in every adapted layer.

    With ∇L(W₀) = P Σ Qᵀ the start is U = −P_r, V = Q_r, S = 2⁻⁴⁰ I: still zero to rounding, but of all updates of rank
    r a growing S follows the gradient best. LoRA-GA (arXiv 2407.05000) starts LoRA from the same singular vectors.

    W₀ needs no gradient of its own, and may be quantized: ∇L(W₀) = Σ (∂L/∂y) xᵀ over inputs x and outputs y. It exists
    for one layer at a time; over several backward passes the 2r + 8 leading directions of the sum are carried on.

    Args:
        model: A `PeftModel` before training, on every process.
        train_step: Computes a loss on one or more batches and calls `backward()`; the gradients are dropped.
        adapter_name: The adapter, which must be active and trainable.

    Returns:
        {layer: share of ‖∇L(W₀)‖_F² that the r directions hold}; the others keep their random start, and are logged.

    Raises:
        ConversionError: No layer got a gradient, or one that is not finite.
    """
    sketches: dict[str, _Sketch] = {}
    hooks = []
    for name, layer in adapted_layers(model, adapter_name).items():
        sketches[name] = _Sketch(layer.condlr_factors[adapter_name])  # type: ignore[arg-type]
        hooks.append(layer.register_forward_hook(sketches[name]))
    try:
        with torch.enable_grad():
            train_step()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    found = {name: sketch for name, sketch in sketches.items() if sketch.squares > 0}
    broken = [name for name, sketch in sketches.items() if not sketch.squares < float("inf")]
    require(
        found and not broken,
        "train_step must call backward() on a loss that reaches the adapter, with finite gradients",
        received=f"NaN or inf in {listed(broken)}" if broken else f"no gradient in a layer of {adapter_name!r}",
        remedy="For example: lambda: model(**batch).loss.backward().",
        error=ConversionError,
    )
    if rest := [name for name in sketches if name not in found]:
        logger.warning("no gradient reached %s: they start from random bases", listed(rest))
    return {name: sketch.start() for name, sketch in found.items()}


class _Sketch:
    """A forward hook that collects the leading singular vectors of a layer's weight gradient.

    The hook is on the output's gradient, which gradient checkpointing, too, computes once.
    """

    def __init__(self, update: LowRankUpdate) -> None:
        self.update = update
        self.rank = min(2 * update.r + 8, update.out_features, update.in_features)
        self.squares = 0.0  # ‖∇L‖_F² of the last sum
        self.svd: tuple[Tensor, Tensor, Tensor] | None = None  # P (m, k), σ (k,), Q (n, k)

    def __call__(self, layer: CondLRLinear, inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            x = inputs[0].detach()
            output.register_hook(lambda gradient: self._add(gradient, x))

    @torch.no_grad()
    def _add(self, gradient: Tensor, x: Tensor) -> None:  # (*, m), (*, n)
        dtype = self.update.S.dtype
        G = gradient.flatten(0, -2).to(dtype).mT @ x.flatten(0, -2).to(dtype)  # (m, n)
        if self.svd is not None:
            P, sigma, Q = self.svd
            G += (P * sigma) @ Q.mT
        self.squares = float(G.square().sum())
        if 0 < self.squares < float("inf"):
            self.svd = torch.svd_lowrank(G, q=self.rank, niter=4)

    def start(self) -> float:
        """Set the factors, and return the share of ‖∇L‖_F² in their directions."""
        assert self.svd is not None  # squares > 0
        r, (P, sigma, Q) = self.update.r, self.svd
        identity = torch.eye(r, dtype=P.dtype, device=P.device)
        self.update.set_factors(retract_qr(-P[:, :r]), START * identity, retract_qr(Q[:, :r]))
        return float(sigma[:r].square().sum()) / self.squares
