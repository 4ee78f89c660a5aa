"""Robust low-rank training for Hugging Face models: W = U S Vᵀ with orthonormal U, V and κ(S) ≤ 1 + τ."""

from hf_condlr.adversarial import AdversarialTraining
from hf_condlr.config import CondLRConfig
from hf_condlr.conversion import fold_model, get_robust_lowrank_model, to_dense_model
from hf_condlr.diagnostics import condition_report
from hf_condlr.evaluation import RobustnessReport, compare, evaluate_robustness, load_split
from hf_condlr.export import export_onnx
from hf_condlr.layers import LowRankConv2d, LowRankLinear
from hf_condlr.loading import FactoredCheckpointLoader  # noqa: F401  # registers itself with transformers
from hf_condlr.manifold import attach_manifold_step
from hf_condlr.metrics import AttackSuccessRate, RobustAccuracy
from hf_condlr.model_card import write_model_card
from hf_condlr.sharded_checkpoints import load_sharded, save_sharded
from hf_condlr.trainer import (
    AdversarialTrainerMixin,
    CondLRSeq2SeqTrainer,
    CondLRTrainer,
    CondLRTrainerMixin,
    FactoredTrainer,
    FactoredTrainerMixin,
    RobustEvaluationMixin,
)
from hf_condlr.training_args import (
    AdversarialArguments,
    CondLRSeq2SeqTrainingArguments,
    CondLRTrainingArguments,
    RobustnessArguments,
)

__all__ = [
    "AdversarialArguments",
    "AdversarialTrainerMixin",
    "AdversarialTraining",
    "AttackSuccessRate",
    "CondLRConfig",
    "CondLRSeq2SeqTrainer",
    "CondLRSeq2SeqTrainingArguments",
    "CondLRTrainer",
    "CondLRTrainerMixin",
    "CondLRTrainingArguments",
    "FactoredTrainer",
    "FactoredTrainerMixin",
    "LowRankConv2d",
    "LowRankLinear",
    "RobustAccuracy",
    "RobustEvaluationMixin",
    "RobustnessArguments",
    "RobustnessReport",
    "attach_manifold_step",
    "compare",
    "condition_report",
    "evaluate_robustness",
    "export_onnx",
    "fold_model",
    "get_robust_lowrank_model",
    "load_sharded",
    "load_split",
    "save_sharded",
    "to_dense_model",
    "write_model_card",
]
__version__ = "0.1.0.dev0"
