"""`Square` (Andriushchenko et al. 2020, arXiv 1912.00049): random search without gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_condlr.robustness.attacks.ball import BallAttack, Norm, norms, per_sample, unit
from hf_condlr.robustness.attacks.base import at_least_float32, attacked, logits_of, require, require_images
from hf_condlr.robustness.attacks.losses import scores

# Of 10,000 queries, those after which the share of the image that a square covers is halved.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass(frozen=True)
class Square(BallAttack):
    """Proposes a square for each sample, and keeps it where the margin max_{j≠y} z_j − z_y rises.

    ℓ∞: vertical stripes of ±ε first, then squares of ±ε, a sign for each channel. ℓ2: a grid of bumps first, then a
    bump that takes over the norm of another, erased square, and what is left of ε. Squares of side s cover the share
    s²/(H·W) of the image, which falls from `p_init`. A gradient attack weaker than this one was misled by masked
    gradients. Unlike in the reference code, each sample has its own squares, which also reach the last row and column.

    Args:
        epsilon: Radius, in pixels of [0, 1].
        norm: `linf` or `l2`.
        queries: Largest number of proposals for each sample; the first that is misclassified is the result.
        p_init: Share of the image that the first squares cover.
        seed: Seed of the squares.
    """

    epsilon: float
    norm: Norm = "linf"
    queries: int = 5000
    p_init: float = 0.8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.queries >= 1, "queries must be ≥ 1", self.queries, "For example 5000.")
        require(0 < self.p_init <= 1, "p_init must be a share in (0, 1]", self.p_init, "For example 0.8.")

    @property
    def name(self) -> str:
        return f"square-{self.norm}"

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Images (B, C, H, W), in at least float32."""
        require_images(inputs)
        generator = torch.Generator().manual_seed(self.seed)
        with attacked(model), torch.no_grad():
            x0 = at_least_float32(inputs)
            best, score = x0.clone(), scores(logits_of(model(x0)), labels, "margin")
            for query in range(self.queries):
                going = (score < torch.inf).nonzero()[:, 0]  # an attack never corrects an error
                if not len(going):
                    break
                if query == 0:
                    delta = self._start(x0, generator)[going]
                else:  # drawn for all samples, so that none depends on which were stopped
                    draws = torch.rand(len(x0), 5 + x0.shape[1], generator=generator).to(x0)[going]
                    delta = self._propose(best[going] - x0[going], draws, query)
                x = (x0[going] + delta).clamp(0, 1)
                new = scores(logits_of(model(x)), labels[going], "margin")
                better = (new > score[going]) | (query == 0)
                best[going[better]], score[going[better]] = x[better], new[better]
        return best

    def _start(self, x0: Tensor, generator: torch.Generator) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        samples, channels, height, width = x0.shape
        if self.norm == "linf":
            return self.epsilon * signs(torch.rand(samples, channels, 1, width, generator=generator).to(x0))
        side = max(1, min(height, width) // 5)
        rows, columns = height // side, width // side
        tiles = signs(torch.rand(samples, channels, rows, 1, columns, 1, generator=generator).to(x0))
        upright = torch.rand(samples, 1, rows, 1, columns, 1, generator=generator).to(x0) < 0.5
        eta = bump(side).to(x0)
        grid = tiles * torch.where(upright, eta[:, None], eta.mT[:, None])  # (B, C, rows, side, columns, side)
        delta = torch.zeros_like(x0)
        delta[..., : rows * side, : columns * side] = grid.flatten(4).flatten(2, 3)
        return self.epsilon * unit(delta)

    def _propose(self, delta: Tensor, draws: Tensor, query: int) -> Tensor:  # (k, C, H, W), (k, 5 + C)
        _, channels, height, width = delta.shape
        side = self._side(query, height, width)
        sign = signs(draws[:, 5:, None, None])
        first, row, column = square(draws[:, 0], draws[:, 1], side, height, width)
        if self.norm == "linf":
            return torch.where(first, self.epsilon * sign, delta)
        second, *_ = square(draws[:, 2], draws[:, 3], side, height, width)
        eta = bump(side).to(delta)
        eta = torch.where(draws[:, 4, None, None] < 0.5, eta[row, column], eta[column, row])[:, None]
        direction = channel_unit(first * (eta * sign + channel_unit(first * delta)))
        spare = (self.epsilon**2 - norms(delta, "l2").square()).clamp_min(0) / channels
        moved = ((first | second) * delta).square().sum((2, 3), keepdim=True)
        delta = torch.where(first | second, direction * (per_sample(spare, delta) + moved).sqrt(), delta)
        return self.epsilon * unit(delta)

    def _side(self, query: int, height: int, width: int) -> int:
        share = self.p_init / 2 ** sum(query * 10_000 / self.queries > limit for limit in HALVINGS)
        side = max(round((share * height * width) ** 0.5), 1)
        if self.norm == "l2":
            side = max(side, 3) // 2 * 2 + 1  # odd, so that the bump has a middle
        return min(side, height, width)


def signs(draws: Tensor) -> Tensor:
    """±1 of draws from [0, 1)."""
    return torch.where(draws < 0.5, -1.0, 1.0)


def square(top: Tensor, left: Tensor, side: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Squares at draws (k,) from [0, 1): mask (k, 1, H, W), each pixel's row (k, H, 1) and column (k, 1, W) inside."""
    row = torch.arange(height, device=top.device) - (top[:, None] * (height - side + 1)).long()
    column = torch.arange(width, device=left.device) - (left[:, None] * (width - side + 1)).long()
    mask = ((row >= 0) & (row < side))[:, None, :, None] & ((column >= 0) & (column < side))[:, None, None, :]
    return mask, row.clamp(0, side - 1)[:, :, None], column.clamp(0, side - 1)[:, None, :]


def bump(side: int) -> Tensor:  # -> (side, side), of norm 1
    """η of the paper's ℓ2 attack: two pyramids, one above the other and of opposite signs."""
    upper, lower = pyramid(side // 2, side), pyramid(side - side // 2, side)
    return torch.cat([upper, -lower]) / (upper.square().sum() + lower.square().sum()).sqrt()


def pyramid(height: int, width: int) -> Tensor:  # -> (height, width), of norm 1
    """Σ_{k>ρ} 1/k² at the distance ρ = max(|row|, |column|) from the middle."""
    row, column = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    levels = 1 / torch.arange(1, max(height, width) // 2 + 2).square()
    values = levels.flip(0).cumsum(0).flip(0)[torch.maximum(row.abs()[:, None], column.abs())]
    return values / values.norm().clamp_min(1e-12)


def channel_unit(x: Tensor) -> Tensor:  # (k, C, H, W)
    """Each channel over its norm."""
    return x / x.square().sum((2, 3), keepdim=True).sqrt().clamp_min(1e-12)
