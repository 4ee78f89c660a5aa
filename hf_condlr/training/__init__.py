"""Training factored models with transformers' Trainer, and with the trainers of other libraries.

`CondLRCallback` keeps the constraint in any Trainer. `CondLRTrainer` is `Trainer` with this callback, checkpoints of
factors, distillation, adversarial training, and attacks in its evaluations. `FactoredTrainerMixin` gives the
checkpoints to the trainers of other libraries.
"""

from hf_condlr.training.adversarial import AdversarialTraining
from hf_condlr.training.arguments import (
    AdversarialArguments,
    CondLRArguments,
    CondLRSeq2SeqTrainingArguments,
    CondLRTrainingArguments,
    RobustnessArguments,
)
from hf_condlr.training.callback import CondLRCallback
from hf_condlr.training.distillation import distillation_loss
from hf_condlr.training.factored import FactoredTrainerMixin
from hf_condlr.training.finite import FiniteGradientsCallback
from hf_condlr.training.trainer import CondLRSeq2SeqTrainer, CondLRTrainer, FactoredTrainer

__all__ = [
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
    "FiniteGradientsCallback",
    "RobustnessArguments",
    "distillation_loss",
]
