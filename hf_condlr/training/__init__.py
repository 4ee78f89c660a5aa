"""transformers' Trainer for factored models; `CondLRTrainer` is the one with the manifold step.

The logic is in mixins, so that `Seq2SeqTrainer` and trainers of other libraries get it too:
`class CondLRSFTTrainer(CondLRTrainerMixin, SFTTrainer)`.
"""

from hf_condlr.training.adversarial import AdversarialTrainerMixin, AdversarialTraining
from hf_condlr.training.distillation import distillation_loss
from hf_condlr.training.factored import FactoredTrainer, FactoredTrainerMixin
from hf_condlr.training.robust_evaluation import RobustEvaluationMixin
from hf_condlr.training.trainer import STATE_FILE, CondLRSeq2SeqTrainer, CondLRTrainer, CondLRTrainerMixin

__all__ = [
    "STATE_FILE",
    "AdversarialTrainerMixin",
    "AdversarialTraining",
    "CondLRSeq2SeqTrainer",
    "CondLRTrainer",
    "CondLRTrainerMixin",
    "FactoredTrainer",
    "FactoredTrainerMixin",
    "RobustEvaluationMixin",
    "distillation_loss",
]
