"""Conversion from dense to W = U S Vᵀ and back: targets, ranks, starts; folding, multiplying out, ONNX export."""

from hf_condlr.conversion.convert import get_robust_lowrank_model
from hf_condlr.conversion.fold import fold_model, to_dense_model
from hf_condlr.conversion.onnx import export_onnx
from hf_condlr.conversion.second_moments import Calibration

__all__ = ["Calibration", "export_onnx", "fold_model", "get_robust_lowrank_model", "to_dense_model"]
