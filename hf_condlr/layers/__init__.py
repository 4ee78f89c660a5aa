"""Layers whose weight is W = U S Vᵀ, and their way from and to dense layers.

U (m, r) and V (n, r) have orthonormal columns, S (r, r) is dense; m = out_features, n = in_features. The layers only
compute: `attach_manifold_step` keeps the constraint while an optimizer moves the factors.
"""

from hf_condlr.layers.base import Factorization, Factors, LowRankLayer, weight_matrix
from hf_condlr.layers.condition_report import ConditionReport, condition_report
from hf_condlr.layers.conv2d import LowRankConv2d
from hf_condlr.layers.folded import FoldedLayer
from hf_condlr.layers.inference import InferenceForm, InferenceLayer
from hf_condlr.layers.linear import LowRankLinear
from hf_condlr.layers.model import (
    ModuleTree,
    compressed_layers,
    converted_layers,
    factored_layers,
    head_names,
    is_factored,
    replace_modules,
)
from hf_condlr.layers.pivoted import PivotedLayer
from hf_condlr.layers.record import (
    ConversionRecord,
    ConversionReport,
    LayerConversion,
    conversion_record,
    set_conversion_record,
)
from hf_condlr.layers.update import LowRankUpdate

__all__ = [
    "ConditionReport",
    "ConversionRecord",
    "ConversionReport",
    "Factorization",
    "Factors",
    "FoldedLayer",
    "InferenceForm",
    "InferenceLayer",
    "LayerConversion",
    "LowRankConv2d",
    "LowRankLayer",
    "LowRankLinear",
    "LowRankUpdate",
    "ModuleTree",
    "PivotedLayer",
    "compressed_layers",
    "condition_report",
    "conversion_record",
    "converted_layers",
    "factored_layers",
    "head_names",
    "is_factored",
    "replace_modules",
    "set_conversion_record",
    "weight_matrix",
]
