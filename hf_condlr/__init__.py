"""Robust low-rank training for Hugging Face models: W = U S Vᵀ with orthonormal U, V and κ(S) ≤ 1 + τ.

The import registers the loader of factored checkpoints with transformers and the adapter with PEFT, and nothing else:
every public name is imported where it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_condlr.adapters.lora_registration import register_lora
from hf_condlr.adapters.registration import register_adapter
from hf_condlr.checkpoints.registration import register

if TYPE_CHECKING:
    from hf_condlr.adapters.config import CondLRAdapterConfig
    from hf_condlr.adapters.gradient_start import start_from_gradient
    from hf_condlr.adapters.lora import to_lora
    from hf_condlr.checkpoints.card import write_model_card
    from hf_condlr.checkpoints.sharded import load_sharded, save_sharded
    from hf_condlr.compression import CompressionArguments, CompressionReport, compress
    from hf_condlr.config import CondLRConfig
    from hf_condlr.conversion.convert import get_robust_lowrank_model
    from hf_condlr.conversion.fold import fold_model, to_dense_model
    from hf_condlr.conversion.onnx import export_onnx
    from hf_condlr.conversion.second_moments import Calibration
    from hf_condlr.layers.condition_report import condition_report
    from hf_condlr.layers.conv2d import LowRankConv2d
    from hf_condlr.layers.linear import LowRankLinear
    from hf_condlr.layers.model import is_factored
    from hf_condlr.manifold.repair import enforce_constraint
    from hf_condlr.manifold.step import attach_manifold_step
    from hf_condlr.robustness.evaluation import RobustnessReport, compare, evaluate_robustness, load_split
    from hf_condlr.robustness.metrics import AttackSuccessRate, RobustAccuracy
    from hf_condlr.scripts.attack_arguments import AttackArguments
    from hf_condlr.scripts.dataset_arguments import DatasetArguments, readable_rows
    from hf_condlr.scripts.dataset_columns import find_column, labelled
    from hf_condlr.scripts.model_arguments import ModelArguments
    from hf_condlr.scripts.packing import pack_texts
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

_MODULES = {
    "adapters.config": ["CondLRAdapterConfig"],
    "adapters.gradient_start": ["start_from_gradient"],
    "adapters.lora": ["to_lora"],
    "checkpoints.card": ["write_model_card"],
    "checkpoints.sharded": ["load_sharded", "save_sharded"],
    "compression": ["CompressionArguments", "CompressionReport", "compress"],
    "config": ["CondLRConfig"],
    "conversion.convert": ["get_robust_lowrank_model"],
    "conversion.fold": ["fold_model", "to_dense_model"],
    "conversion.onnx": ["export_onnx"],
    "conversion.second_moments": ["Calibration"],
    "layers.condition_report": ["condition_report"],
    "layers.conv2d": ["LowRankConv2d"],
    "layers.linear": ["LowRankLinear"],
    "layers.model": ["is_factored"],
    "manifold.repair": ["enforce_constraint"],
    "manifold.step": ["attach_manifold_step"],
    "robustness.evaluation": ["RobustnessReport", "compare", "evaluate_robustness", "load_split"],
    "robustness.metrics": ["AttackSuccessRate", "RobustAccuracy"],
    "scripts.attack_arguments": ["AttackArguments"],
    "scripts.dataset_arguments": ["DatasetArguments", "readable_rows"],
    "scripts.dataset_columns": ["find_column", "labelled"],
    "scripts.model_arguments": ["ModelArguments"],
    "scripts.packing": ["pack_texts"],
    "scripts.parser": ["ScriptParser", "require_one_group"],
    "scripts.resuming": ["checkpoint_to_resume"],
    "scripts.runs": ["train_and_save", "trainer_class", "write_results"],
    "training": [
        "AdversarialArguments",
        "AdversarialTraining",
        "CondLRArguments",
        "CondLRCallback",
        "CondLRSeq2SeqTrainer",
        "CondLRSeq2SeqTrainingArguments",
        "CondLRTrainer",
        "CondLRTrainingArguments",
        "FactoredTrainer",
        "FactoredTrainerMixin",
        "RobustnessArguments",
    ],
}
"""{module: its public names}, as above."""
_PACKAGES = (
    "adapters",
    "checkpoints",
    "cli",
    "compression",
    "conversion",
    "distributed",
    "layers",
    "linalg",
    "manifold",
    "robustness",
    "scripts",
    "training",
)

__all__ = [
    "AdversarialArguments",
    "AdversarialTraining",
    "AttackArguments",
    "AttackSuccessRate",
    "Calibration",
    "CompressionArguments",
    "CompressionReport",
    "CondLRAdapterConfig",
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
    "compress",
    "condition_report",
    "enforce_constraint",
    "evaluate_robustness",
    "export_onnx",
    "find_column",
    "fold_model",
    "get_robust_lowrank_model",
    "is_factored",
    "labelled",
    "load_sharded",
    "load_split",
    "pack_texts",
    "readable_rows",
    "require_one_group",
    "save_sharded",
    "start_from_gradient",
    "to_dense_model",
    "to_lora",
    "train_and_save",
    "trainer_class",
    "write_model_card",
    "write_results",
]
__version__ = "0.1.0.dev0"

register()
register_adapter()
register_lora()

if not TYPE_CHECKING:  # a type checker would take every name for one of the package's

    def __getattr__(name: str) -> Any:
        """Import a public name, or a package below, on its first use (PEP 562)."""
        module = next((module for module, names in _MODULES.items() if name in names), None)
        if module is not None:
            value = getattr(import_module(f"{__name__}.{module}"), name)
        elif name in _PACKAGES:
            value = import_module(f"{__name__}.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_PACKAGES})
