"""Adapters: a method of PEFT in which the low-rank update of a frozen model obeys the constraint.

Importing it registers the method with PEFT.
"""

from hf_condlr.adapters.config import CondLRAdapterConfig
from hf_condlr.adapters.gradient_start import start_from_gradient
from hf_condlr.adapters.lora import to_lora
from hf_condlr.adapters.registration import register

__all__ = ["CondLRAdapterConfig", "start_from_gradient", "to_lora"]

register()
