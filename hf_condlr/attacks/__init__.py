"""Adversarial attacks: callables on (model, inputs, labels). They know bounds, never data sets or factored layers."""

from hf_condlr.attacks.base import Attack
from hf_condlr.attacks.gradient import FGSM, PGD
from hf_condlr.attacks.pixels import PixelModel

__all__ = ["FGSM", "PGD", "Attack", "PixelModel"]
