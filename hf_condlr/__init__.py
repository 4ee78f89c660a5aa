"""Robust low-rank training for Hugging Face models: W = U S Vᵀ with orthonormal U, V and κ(S) ≤ 1 + τ."""

from hf_condlr.checkpoints.card import write_model_card
from hf_condlr.checkpoints.load import FactoredCheckpointLoader  # noqa: F401  # registers itself with transformers
from hf_condlr.checkpoints.sharded import load_sharded, save_sharded
from hf_condlr.config import CondLRConfig
from hf_condlr.conversion.convert import get_robust_lowrank_model
from hf_condlr.conversion.fold import fold_model, to_dense_model
from hf_condlr.conversion.onnx import export_onnx
from hf_condlr.conversion.second_moments import Calibration
from hf_condlr.layers import LowRankConv2d, LowRankLinear, condition_report, is_factored
from hf_condlr.manifold.step import attach_manifold_step
from hf_condlr.robustness.evaluation import RobustnessReport, compare, evaluate_robustness, load_split
from hf_condlr.robustness.metrics import AttackSuccessRate, RobustAccuracy
from hf_condlr.scripts.attack_arguments import AttackArguments
from hf_condlr.scripts.dataset_arguments import DatasetArguments, readable_rows
from hf_condlr.scripts.dataset_columns import find_column, labelled
from hf_condlr.scripts.model_arguments import ModelArguments
from hf_condlr.scripts.parser import ScriptParser, require_one_group
from hf_condlr.scripts.resuming import checkpoint_to_resume
from hf_condlr.scripts.runs import train_and_save, trainer_class, write_results
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
    "AttackArguments",
    "AttackSuccessRate",
    "Calibration",
    "CondLRArguments",
    "CondLRCallback",
    "CondLRConfig",
    "CondLRSeq2SeqTrainer",
    "CondLRSeq2SeqTrainingArguments",
    "CondLRTrainer",
    "CondLRTrainingArguments",
    "DatasetArguments",
    "FactoredTrainer",
    "FactoredTrainerMixin",
    "LowRankConv2d",
    "LowRankLinear",
    "ModelArguments",
    "RobustAccuracy",
    "RobustnessArguments",
    "RobustnessReport",
    "ScriptParser",
    "attach_manifold_step",
    "checkpoint_to_resume",
    "compare",
    "condition_report",
    "evaluate_robustness",
    "export_onnx",
    "find_column",
    "fold_model",
    "get_robust_lowrank_model",
    "is_factored",
    "labelled",
    "load_sharded",
    "load_split",
    "readable_rows",
    "require_one_group",
    "save_sharded",
    "to_dense_model",
    "train_and_save",
    "trainer_class",
    "write_model_card",
    "write_results",
]
__version__ = "0.1.0.dev0"
