"""Robust low-rank training for Hugging Face models: W = U S Vᵀ with orthonormal U, V and κ(S) ≤ 1 + τ."""

from hf_condlr.checkpoints.card import write_model_card
from hf_condlr.checkpoints.load import FactoredCheckpointLoader  # noqa: F401  # registers itself with transformers
from hf_condlr.checkpoints.sharded import load_sharded, save_sharded
from hf_condlr.config import CondLRConfig
from hf_condlr.conversion.convert import get_robust_lowrank_model
from hf_condlr.conversion.fold import fold_model, to_dense_model
from hf_condlr.conversion.onnx import export_onnx
from hf_condlr.layers import LowRankConv2d, LowRankLinear, condition_report, is_factored
from hf_condlr.manifold.step import attach_manifold_step
from hf_condlr.robustness.evaluation import RobustnessReport, compare, evaluate_robustness, load_split
from hf_condlr.robustness.metrics import AttackSuccessRate, RobustAccuracy
from hf_condlr.training import (
    AdversarialArguments,
    AdversarialTraining,
    CondLRArguments,
    CondLRCallback,
    CondLRSeq2SeqTrainer,
    CondLRSeq2SeqTrainingArguments,
    CondLRTrainer,
    CondLRTrainingArguments,
    FactoredTrainer,
    FactoredTrainerMixin,
    RobustnessArguments,
)

__all__ = [
    "AdversarialArguments",
    "AdversarialTraining",
    "AttackSuccessRate",
    "CondLRArguments",
    "CondLRCallback",
    "CondLRConfig",
    "CondLRSeq2SeqTrainer",
    "CondLRSeq2SeqTrainingArguments",
    "CondLRTrainer",
    "CondLRTrainingArguments",
    "FactoredTrainer",
    "FactoredTrainerMixin",
    "LowRankConv2d",
    "LowRankLinear",
    "RobustAccuracy",
    "RobustnessArguments",
    "RobustnessReport",
    "attach_manifold_step",
    "compare",
    "condition_report",
    "evaluate_robustness",
    "export_onnx",
    "fold_model",
    "get_robust_lowrank_model",
    "is_factored",
    "load_sharded",
    "load_split",
    "save_sharded",
    "to_dense_model",
    "write_model_card",
]
__version__ = "0.1.0.dev0"
