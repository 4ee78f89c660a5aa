"""`CondLRTrainingArguments`: what robust low-rank training adds to transformers' `TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_condlr.errors import ConfigError


@dataclass
class CondLRArguments:
    """What robust low-rank training adds to `TrainingArguments`."""

    conditioning_warmup_ratio: float = field(
        default=0.3,
        metadata={"help": "Share of the training over which the bound on κ falls to 1 + tau; 0 conditions at once."},
    )
    factor_learning_rate: float = field(
        default=1.0, metadata={"help": "Multiplier of the learning rate for the orthonormal factors U and V."}
    )
    core_learning_rate: float = field(
        default=1.0, metadata={"help": "Multiplier of the learning rate for the cores S."}
    )
    metric_scaling: bool | None = field(
        default=None,
        metadata={"help": "Divide the gradients of U and V by ‖S‖²_F/r; by default on for SGD, off for others."},
    )
    distillation_weight: float = field(
        default=0.0,
        metadata={"help": "Weight λ of the teacher in (1 − λ) loss + λ T² KL(teacher ‖ student); needs a teacher."},
    )
    distillation_temperature: float = field(
        default=2.0, metadata={"help": "Temperature T that divides both logits in the distillation term."}
    )

    def __post_init__(self) -> None:
        if hasattr(super(), "__post_init__"):
            super().__post_init__()  # type: ignore[misc]
        for name, valid, rule in (
            ("conditioning_warmup_ratio", 0 <= self.conditioning_warmup_ratio <= 1, "lie in [0, 1]"),
            ("factor_learning_rate", self.factor_learning_rate >= 0, "be ≥ 0"),
            ("core_learning_rate", self.core_learning_rate >= 0, "be ≥ 0"),
            ("distillation_weight", 0 <= self.distillation_weight <= 1, "lie in [0, 1]"),
            ("distillation_temperature", self.distillation_temperature > 0, "be > 0"),
            ("bf16_full_eval", not getattr(self, "bf16_full_eval", False), "be off: rounding breaks the bound"),
            ("fp16_full_eval", not getattr(self, "fp16_full_eval", False), "be off: rounding breaks the bound"),
        ):
            if not valid:
                raise ConfigError(f"{name} must {rule}", received=getattr(self, name), remedy="See its help.")


@dataclass
class CondLRTrainingArguments(CondLRArguments, TrainingArguments):
    """`TrainingArguments` and `CondLRArguments`."""


@dataclass
class CondLRSeq2SeqTrainingArguments(CondLRArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` and `CondLRArguments`."""
