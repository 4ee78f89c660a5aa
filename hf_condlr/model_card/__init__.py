"""`write_model_card`: a README.md for the Hub that states what was measured, and nothing else."""

from hf_condlr.model_card.card import write_model_card

__all__ = ["write_model_card"]
