"""transformers' Trainer for factored models; `CondLRTrainer` is the one with the manifold step.

The logic is in mixins, so that `Seq2SeqTrainer` and trainers of other libraries get it too:
`class CondLRSFTTrainer(CondLRTrainerMixin, SFTTrainer)`.
"""

from hf_condlr.trainer.adversarial import AdversarialTrainerMixin
from hf_condlr.trainer.condlr import STATE_FILE, CondLRSeq2SeqTrainer, CondLRTrainer, CondLRTrainerMixin
from hf_condlr.trainer.distillation import distillation_loss
from hf_condlr.trainer.factored import FactoredTrainer, FactoredTrainerMixin
from hf_condlr.trainer.robustness import RobustEvaluationMixin

__all__ = [
    "STATE_FILE",
    "AdversarialTrainerMixin",
    "CondLRSeq2SeqTrainer",
    "CondLRTrainer",
    "CondLRTrainerMixin",
    "FactoredTrainer",
    "FactoredTrainerMixin",
    "RobustEvaluationMixin",
    "distillation_loss",
]
