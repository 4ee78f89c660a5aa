"""Adversarial training, in the Trainer or in a loop of one's own."""

from hf_condlr.adversarial.training import AdversarialBatch, AdversarialTraining

__all__ = ["AdversarialBatch", "AdversarialTraining"]
