"""What TF32 would do to the constraint, emulated on a CPU: float32 products of operands rounded to 10 bits.

Retraction: X = U + Δ with horizontal Δ, U ← X L⁻ᵀ, LLᵀ = XᵀX. Either all products are in TF32, or those of increments
only: UᵀΔ, ΔᵀΔ and X(L⁻ᵀ − I), with XᵀX = I + UᵀΔ + ΔᵀU + ΔᵀΔ, so that the errors are relative to the small part. The
table has ‖UᵀU − I‖_F/√r after some steps; the guarantee is 1e-5.

Clip: signs of H − aI and H − βaI by Newton–Schulz, and H ← H + (aI − H)₊ − (H − βaI)₊, all in TF32. The table has the
excess of κ over β.

    python -m benchmarks.gpu.tf32
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_condlr.linalg import orthonormality_error
from hf_condlr.tables import markdown_table

WAYS = ("all products in TF32", "products of increments", "float32")


def rounded(X: Tensor) -> Tensor:
    """To 10 bits of mantissa, as tensor cores read float32; in float64, so that only this is rounded."""
    bits = X.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).double()


def product(A: Tensor, B: Tensor) -> Tensor:
    """AB in TF32."""
    return rounded(A) @ rounded(B)


def retract(U: Tensor, D: Tensor, way: str) -> Tensor:  # (m, r), (m, r) -> (m, r), float64
    """The retraction of U + (I − UUᵀ)D, the result rounded to float32."""
    identity = torch.eye(U.shape[1], dtype=U.dtype)
    multiply = torch.matmul if way == WAYS[2] else product
    D = D - multiply(U, multiply(U.mT, D))
    X = U + D
    if way == WAYS[1]:
        C = product(U.mT, D)
        gram = identity + (C + C.mT) + product(D.mT, D)
        inverse = torch.linalg.inv(torch.linalg.cholesky(gram))
        result = X + product(X, inverse.mT - identity)
    else:
        inverse = torch.linalg.inv(torch.linalg.cholesky(multiply(X.mT, X)))
        result = multiply(X, inverse.mT)
    return result.float().double()


def drift(way: str, step: float, counts: tuple[int, ...], m: int = 768, r: int = 96) -> list[float]:
    """‖UᵀU − I‖_F/√r after so many steps with ‖D‖₂ ≈ `step` (1 + √(r/m))."""
    torch.manual_seed(0)
    U, errors = torch.linalg.qr(torch.randn(m, r, dtype=torch.float64)).Q, []
    for count in range(1, max(counts) + 1):
        U = retract(U, step * torch.randn(m, r, dtype=torch.float64) / m**0.5, way)
        if count in counts:
            errors.append(orthonormality_error(U).item() / r**0.5)
    return errors


def excess(bound: float, step: float, iterations: int = 16, r: int = 96) -> float:
    """κ/β − 1 of cores clipped in TF32, after a step of that relative size from within the bound."""
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64)).Q
    noise = torch.randn(r, r, dtype=torch.float64) / r**0.5
    H = Q @ torch.diag(torch.linspace(1, bound, r, dtype=torch.float64)) @ Q.mT + step * (noise + noise.mT) / 2
    identity, parts = torch.eye(r, dtype=torch.float64), []
    for end in (1.0, bound):
        X = H - end * identity
        sign = X / torch.linalg.matrix_norm(X, 2)
        for _ in range(iterations):
            sign = product(sign, 1.5 * identity - 0.5 * product(sign.mT, sign))
        parts.append((X, (product(X, sign) + product(sign, X)) / 2))
    (low, below), (high, above) = parts
    H = H + (below - low) / 2 - (above + high) / 2
    spectrum = torch.linalg.eigvalsh((H + H.mT) / 2)
    return (spectrum[-1] / spectrum[0]).item() / bound - 1


def table() -> str:
    """Both tables."""
    counts, lines = (1, 10, 100), []
    for step in (1e-3, 1e-2, 1e-1):
        for way in WAYS:
            lines.append([f"{step:g}", way, *(f"{x:.1e}" for x in drift(way, step, counts))])
    first = markdown_table(["step", "products", *(f"after {n}" for n in counts)], lines, align="llr")
    steps = (1e-3, 1e-2, 1e-1)
    rows = [[f"{bound:g}", *(f"{excess(bound, step):.1e}" for step in steps)] for bound in (1.1, 1.5, 4.0)]
    return f"{first}\n\n{markdown_table(['β', *(f'step {x:g}' for x in steps)], rows, align='r')}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
