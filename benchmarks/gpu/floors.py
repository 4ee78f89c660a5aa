"""The least time of a step on a GPU: operations over the unit's rate, bytes over bandwidth.

Nothing here is measured. The operations of the manifold step are counted from the shapes of the factors, by formulas
that the tests compare with torch's counter of operations; the rates are those of the data sheet for dense matrices.
Launches, Cholesky decompositions and triangular inverses, which are of low order but far from these rates, come on top.

    python -m benchmarks.gpu.floors
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.manifold_step import SHAPES, Shape, rank_ratio_at, shapes_of
from hf_condlr.linalg import clip_core_by_products
from hf_condlr.tables import markdown_table

RATES = {"float64": 67e12, "float32": 67e12, "tf32": 495e12, "bfloat16": 989e12}
"""Operations a second of an H100 SXM or H200 with dense matrices: float64 on tensor cores, float32 without them."""

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12}
"""Bytes a second."""

REMOVED = 0.6
"""Share of the linear layers' weights removed."""


@dataclass(frozen=True)
class Model:
    """A model and the batch of its training step.

    Attributes:
        name: Of its factors' shapes in `manifold_step.SHAPES`.
        tokens: Rows of the linear layers in a step: 128 pictures of 197 tokens, or 8 texts of 1,024.
        length: Tokens that attend to each other.
    """

    name: str
    tokens: int
    length: int


MODELS = (Model("vit-b", 128 * 197, 197), Model("vit-l", 128 * 197, 197), Model("llama-1b", 8 * 1024, 1024))


def basis_operations(shapes: Sequence[Shape]) -> float:
    """12(m + n)r² a layer: two projections, a Gram matrix and the product with its inverse factor, for U and for V."""
    return sum(12.0 * (m + n) * r**2 for m, n, r in shapes)


def core_operations(shapes: Sequence[Shape], products: float) -> float:
    """Conditioning by so many r×r products a core."""
    return sum(2.0 * products * r**3 for _, _, r in shapes)


def step_bytes(shapes: Sequence[Shape]) -> float:
    """Passes over float32 bases and cores, each tensor once: U and G read, G written; U, U₀ read, U written."""
    return 4.0 * 6 * sum(r * (m + n) + r**2 for m, n, r in shapes)


def linear_operations(shapes: Sequence[Shape], tokens: int, factored: bool) -> float:
    """Forward and backward of the linear layers with B rows: 6Bmn, factored 6B r(m + n) + 6 min(m, n) r²."""
    if factored:
        return sum(6.0 * tokens * r * (m + n) + 6.0 * min(m, n) * r**2 for m, n, r in shapes)
    return sum(6.0 * tokens * m * n for m, n, _ in shapes)


def attention_operations(model: Model) -> float:
    """Forward and backward of QKᵀ and of its product with V: 12 B T d a block, B rows, T tokens that attend."""
    block, blocks = SHAPES[model.name]
    return 12.0 * model.tokens * model.length * block[0][0] * blocks


def products_of_the_clip() -> float:
    """r×r products of a core's conditioning on a GPU, as torch counts them on small cores."""
    r = 4
    S, bound = torch.eye(r).unsqueeze(0), torch.full((1,), 1.1, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        clip_core_by_products(S, bound, "nearest", S)
    return counter.get_total_flops() / (2 * r**3)


def floors(model: Model, products: float, card: str = "H100") -> dict[str, float]:
    """Seconds of each part at `REMOVED`, with so many products a core in conditioning."""
    shapes = shapes_of(model.name, rank_ratio_at(model.name, REMOVED))
    dense_weights = sum(m * n for m, n, _ in shapes)
    weights = sum(r * (m + n) + r**2 for m, n, r in shapes)
    attention = attention_operations(model)
    dense, factored = (linear_operations(shapes, model.tokens, x) + attention for x in (False, True))
    adamw = 4.0 * 7  # weight, gradient and both moments read; weight and moments written
    return {
        "dense: forward and backward, bfloat16": dense / RATES["bfloat16"],
        "dense: AdamW": adamw * dense_weights / BANDWIDTH[card],
        "low rank: forward and backward, bfloat16": factored / RATES["bfloat16"],
        "low rank: AdamW": adamw * weights / BANDWIDTH[card],
        "step: bases, float32": basis_operations(shapes) / RATES["float32"],
        "step: bases, TF32": basis_operations(shapes) / RATES["tf32"],
        "step: passes over memory": step_bytes(shapes) / BANDWIDTH[card],
        f"step: cores, {products:.0f} products in float64": core_operations(shapes, products) / RATES["float64"],
    }


def table() -> str:
    """A row for each part, a column for each model."""
    products = products_of_the_clip()
    columns = [floors(model, products) for model in MODELS]
    lines = [[part, *(f"{1e3 * column[part]:.2f}" for column in columns)] for part in columns[0]]
    return markdown_table(["floor on an H100, ms", *(model.name for model in MODELS)], lines, align="lr")


if __name__ == "__main__":
    print(table())
