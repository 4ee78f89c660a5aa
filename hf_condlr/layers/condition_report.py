"""`condition_report`: rank, κ, bound, orthonormality and size of every factored layer; a table, a dict, a picture."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_condlr.distributed.sharded_linalg import orthonormality_error, orthonormalize
from hf_condlr.distributed.shards import reshard
from hf_condlr.errors import MissingExtraError, require
from hf_condlr.layers.base import Factors, LowRankLayer
from hf_condlr.layers.inference import InferenceLayer
from hf_condlr.layers.model import compressed_layers, factored_layers, loaded_factors
from hf_condlr.layers.record import factored_size
from hf_condlr.linalg import obeys_bound, singular_values
from hf_condlr.options import finite_json


@dataclass
class LayerRecord:
    """Measurements of one layer: factored, folded or pivoted."""

    name: str
    shape: tuple[int, int]  # (m, n) = (out, in) of the matrix W
    r: int
    condition_number: float  # σ_max/σ_min over the r singular values of W; inf if one is 0 or factors are not finite
    bound: float  # on κ; inf before the first step, without a manifold step, and for tau = inf
    orthonormality_error: float  # the larger of ‖UᵀU − I‖_F and ‖VᵀV − I‖_F; of V alone folded, 0 pivoted
    singular_values: list[float]  # the r of W, descending
    parameters: int  # r(m + n) + r², folded r(m + n), pivoted r(m + n − r), and the bias
    folded_parameters: int  # r(m + n), and the bias: once folded; of a pivoted layer its own
    dense_parameters: int  # mn, and the bias


@dataclass
class ConditionReport:
    """Result of `condition_report`; `str()` is a table."""

    layers: list[LayerRecord]
    parameters: int  # of the full model
    folded_parameters: int  # the same once folded for inference
    dense_parameters: int  # the same if its factored layers were dense, and its adapters merged

    @property
    def max_condition_number(self) -> float:
        """The largest κ of all layers."""
        return max(layer.condition_number for layer in self.layers)

    @property
    def mean_condition_number(self) -> float:
        """The mean κ of all layers."""
        return sum(layer.condition_number for layer in self.layers) / len(self.layers)

    @property
    def max_orthonormality_error(self) -> float:
        """The largest orthonormality error of all layers."""
        return max(layer.orthonormality_error for layer in self.layers)

    @property
    def compression(self) -> float:
        """Share of the full model's parameters that factoring removed; below 0 is the share that adapters add."""
        return 1 - self.parameters / self.dense_parameters

    @property
    def folded_compression(self) -> float:
        """Share of the full model's parameters that is removed once the model is folded."""
        return 1 - self.folded_parameters / self.dense_parameters

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON values; an infinite or undefined number is None."""
        names = ("max_condition_number", "mean_condition_number", "max_orthonormality_error")
        return finite_json(asdict(self) | {name: getattr(self, name) for name in names})

    def __str__(self) -> str:
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        header = f"{'layer':<{width}}  {'out×in':>11}  {'rank':>5}  {'κ':>9}  {'bound':>7}  {'‖UᵀU−I‖':>8}  "
        header += f"{'parameters':>11}  {'of dense':>8}"
        rule = "-" * len(header)
        rows = [
            f"{layer.name:<{width}}  {'×'.join(map(str, layer.shape)):>11}  {layer.r:>5}  "
            f"{layer.condition_number:>9.4g}  {layer.bound:>7.4g}  {layer.orthonormality_error:>8.1e}  "
            f"{layer.parameters:>11,}  {layer.parameters / layer.dense_parameters:>8.1%}"
            for layer in self.layers
        ]
        folded = f"; folded for inference: {self.folded_parameters:,}, {self.folded_compression:.1%} removed"
        if self.folded_parameters == self.parameters:  # only adapters, which are merged
            folded = ""
        change = f"{abs(self.compression):.1%} {'removed' if self.compression >= 0 else 'added'}"
        totals = (
            f"{len(self.layers)} layers, κ at most {self.max_condition_number:.4g}, "
            f"mean {self.mean_condition_number:.4g}; full model: {self.parameters:,} of {self.dense_parameters:,} "
            f"parameters, {change}{folded}"
        )
        return "\n".join([header, rule, *rows, rule, totals])

    def plot(self, path: str | Path) -> Path:
        """Draw the spectra and κ per layer into an image file (its ending chooses the format).

        Raises:
            MissingExtraError: matplotlib is not installed; an `ImportError`.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            remedy = "pip install 'hf_condlr[plot]'."
            raise MissingExtraError("plot needs matplotlib", received="no such package", remedy=remedy) from error
        count = len(self.layers)
        figure = Figure(figsize=(11, max(3.2, 1.2 + 0.19 * count)), layout="constrained")
        spectra, bars = figure.subplots(1, 2, width_ratios=(1, 1.25))
        for i, layer in enumerate(self.layers):
            sigma = torch.tensor(layer.singular_values)
            color = (0.15, 0.35 + 0.5 * i / count, 0.65)
            spectra.semilogy(torch.linspace(0, 1, layer.r), sigma / sigma[0].clamp_min(1e-30), color=color, linewidth=1)
        spectra.set(xlabel="index / rank", ylabel="σ / σ_max", title="Singular values of each layer")
        spectra.set_ylim(bottom=min(0.5, spectra.get_ylim()[0]), top=1.1)
        kappa = [min(layer.condition_number, 1e16) for layer in self.layers]
        bars.barh([layer.name for layer in self.layers], kappa, color="#3b6ea5", height=0.7)
        bounds = [layer.bound if math.isfinite(layer.bound) else math.nan for layer in self.layers]
        bars.plot(bounds, range(count), "|", color="#c1432e", markersize=9, markeredgewidth=2, label="bound")
        bars.legend(loc="lower right")
        bars.set(xscale="log", xlabel="condition number κ", title="κ(W) of each layer")
        bars.set_xlim(0.9, 1.3 * max(1.6, *kappa, *(bound for bound in bounds if bound > 0)))
        for axis in (bars.xaxis, spectra.yaxis):
            low, high = axis.get_view_interval()
            axis.set_major_formatter("{x:g}")  # 1.5, not 1.5 × 10⁰
            axis.set_minor_formatter("{x:g}" if high < 10 * low else "")
        bars.invert_yaxis()
        bars.tick_params(axis="y", labelsize=7)
        figure.savefig(path, dpi=150)
        return Path(path)


@torch.no_grad()
def condition_report(model: nn.Module) -> ConditionReport:
    """Measure every compressed layer, adapters included, in float64; of quantized weights the values.

    κ is that of W = U S Vᵀ on its r directions, also where U and V are not orthonormal (trained without the manifold
    step): the singular values of R_U S R_Vᵀ with U = Q_U R_U and V = Q_V R_V. Every process of a sharded
    model must call it; bases are not gathered.

    Raises:
        CondLRError: The model has no factored layers.
    """
    reshard(model)
    compressed = compressed_layers(model)  # without adapters, which took the place of nothing
    records = [
        _inference_record(name, layer)
        if isinstance(layer, InferenceLayer)
        else _record(name, layer, loaded_factors(model, name))
        for name, layer in (factored_layers(model) | compressed).items()
    ]
    remedy = "Call get_robust_lowrank_model(model, config) first."
    require(records, "the model must have factored layers", received="none", remedy=remedy)
    parameters = sum(p.numel() for p in model.parameters())
    dense = parameters - sum(record.parameters for record in records)
    dense += sum(record.dense_parameters for record in records if record.name in compressed)
    folded = parameters - sum(x.parameters - x.folded_parameters for x in records if x.name in compressed)
    return ConditionReport(records, parameters, folded, dense)


def _record(name: str, layer: LowRankLayer, factors: Factors) -> LayerRecord:
    U, _, V = factors
    sigma, kappa = _spectrum(factors)
    error = torch.maximum(orthonormality_error(U), orthonormality_error(V)).item()
    m, n = len(layer.U), len(layer.V)
    bias = 0 if layer.bias is None else layer.bias.numel()
    return LayerRecord(
        name=name,
        shape=(m, n),
        r=layer.r,
        condition_number=kappa,
        # A layer that was trained without the manifold step need not obey its bound.
        bound=layer.bound if obeys_bound(kappa, layer.bound) else math.inf,
        orthonormality_error=error if math.isfinite(error) else math.inf,
        singular_values=sigma.tolist(),
        parameters=factored_size(m, n, layer.r) + bias,
        folded_parameters=factored_size(m, n, layer.r, "folded") + bias,
        dense_parameters=m * n + bias,
    )


def _inference_record(name: str, layer: InferenceLayer) -> LayerRecord:
    rule, remedy = "κ of a layer for inference needs its weights in memory", "Load the model without device_map."
    require(not layer.up.weight.is_meta, rule, received=f"{name} on the meta device", remedy=remedy)
    L, R = layer.values()
    (m, r), n = L.shape, R.shape[1]
    sigma, kappa = _spectrum((L, torch.eye(r, dtype=L.dtype, device=L.device), R.mT))
    error = orthonormality_error(R.mT).item() if layer.form == "folded" else 0.0
    bias = m if layer.bias is not None else 0
    parameters = bias + factored_size(m, n, r, layer.form)
    return LayerRecord(
        name=name,
        shape=(m, n),
        r=r,
        condition_number=kappa,
        bound=math.inf,
        orthonormality_error=error if math.isfinite(error) else math.inf,
        singular_values=sigma.tolist(),
        parameters=parameters,
        folded_parameters=parameters,
        dense_parameters=m * n + bias,
    )


def _spectrum(factors: Factors) -> tuple[Tensor, float]:
    """The r singular values of W = U S Vᵀ, descending, and κ on these directions."""
    core = orthonormalize(*factors)[1].cpu()
    if not torch.isfinite(core).all():
        return torch.full((len(core),), math.nan), math.inf
    sigma = singular_values(core)
    return sigma, (sigma[0] / sigma[-1]).item() if sigma[-1] > 0 else math.inf
