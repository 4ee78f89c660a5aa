"""Record of a model's conversion, in `model.condlr`: the config, and the result for each layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import nn

from hf_condlr.config import CompressionForm, CondLRConfig


def factored_size(m: int, n: int, r: int, form: CompressionForm = "training") -> int:
    """Number of weights: r(m + n) + r² of U, S, V in training, r(m + n) of U S and V folded, r(m + n − r) pivoted."""
    return r * (m + n) + {"training": 1, "folded": 0, "pivoted": -1}[form] * r * r


@dataclass
class LayerConversion:
    """Result of the conversion for one layer."""

    r: int
    shape: tuple[int, int]  # (m, n)
    truncation_error: float  # ‖W − U S Vᵀ‖_F / ‖W‖_F
    optimal_truncation_error: float | None = None  # the least error at this rank, measured for `randomized_svd` only
    whitened_truncation_error: float | None = None  # of (W − U S Vᵀ) C^{1/2}; sequential: (A − U S Vᵀ) Ĉ^{1/2}

    @property
    def parameters(self) -> int:
        """r(m + n) + r², without the bias: while the layer trains."""
        return factored_size(*self.shape, self.r)

    @property
    def folded_parameters(self) -> int:
        """r(m + n), without the bias: once the layer is folded for inference."""
        return factored_size(*self.shape, self.r, "folded")

    @property
    def pivoted_parameters(self) -> int:
        """r(m + n − r), without the bias: once the layer is pivoted for inference."""
        return factored_size(*self.shape, self.r, "pivoted")


@dataclass
class ConversionReport:
    """Layers converted, and layers that match the targets but stay dense, with the reason; `str()` sums them up."""

    converted: dict[str, LayerConversion] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        dense = sum(math.prod(layer.shape) for layer in self.converted.values())
        factored = sum(layer.parameters for layer in self.converted.values())
        folded = sum(layer.folded_parameters for layer in self.converted.values())
        pivoted = sum(layer.pivoted_parameters for layer in self.converted.values())
        sizes = f"{dense:,} weights became {factored:,}, {folded:,} once folded, {pivoted:,} once pivoted"
        lines = [f"{len(self.converted)} layers converted, {sizes}"]
        return "\n".join(lines + [f"  left dense: {name}: {reason}" for name, reason in self.skipped.items()])


@dataclass(frozen=True)
class ConversionRecord:
    """`model.condlr`: copies and pickles of the model keep it; checkpoints keep the config."""

    config: CondLRConfig | None  # of the last conversion; None for a checkpoint that was saved without one
    report: ConversionReport | None = None  # what became of each layer; None for a model loaded from a checkpoint


def conversion_record(model: nn.Module) -> ConversionRecord:
    """`model.condlr`, or an empty record if the model has none."""
    return getattr(model, "condlr", None) or ConversionRecord(None)


def set_conversion_record(model: nn.Module, record: ConversionRecord | None) -> None:
    """Set `model.condlr`, or with None remove it."""
    if record is None:
        vars(model).pop("condlr", None)
    else:
        object.__setattr__(model, "condlr", record)
