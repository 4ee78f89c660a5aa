"""Adversarial attacks: callables on (model, inputs, labels). They know bounds, never data sets or factored layers."""

from hf_condlr.robustness.attacks.autoattack import AutoAttack
from hf_condlr.robustness.attacks.base import Attack
from hf_condlr.robustness.attacks.characters import CharacterAttack
from hf_condlr.robustness.attacks.corruptions import Corruption
from hf_condlr.robustness.attacks.embeddings import EmbeddingFGM, EmbeddingPGD, EmbeddingSearch
from hf_condlr.robustness.attacks.gradient import FGSM, PGD
from hf_condlr.robustness.attacks.pixels import PixelModel
from hf_condlr.robustness.attacks.published import L2FGSM, Jitter
from hf_condlr.robustness.attacks.registry import ATTACKS, make_attack, make_attacks, parse_epsilon
from hf_condlr.robustness.attacks.square import Square
from hf_condlr.robustness.attacks.text import TextModel
from hf_condlr.robustness.attacks.transfer import Transfer

__all__ = [
    "ATTACKS",
    "FGSM",
    "L2FGSM",
    "PGD",
    "Attack",
    "AutoAttack",
    "CharacterAttack",
    "Corruption",
    "EmbeddingFGM",
    "EmbeddingPGD",
    "EmbeddingSearch",
    "Jitter",
    "PixelModel",
    "Square",
    "TextModel",
    "Transfer",
    "make_attack",
    "make_attacks",
    "parse_epsilon",
]
