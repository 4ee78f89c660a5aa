"""Adversarial attacks: callables on (model, inputs, labels). They know pixels and texts, not data sets or layers.

How to add an attack:

1. Write a frozen dataclass of its parameters in its own file, derived from `Attack`, or from `BallAttack` (ℓ∞ and
   ℓ2 balls), `EmbeddingAttack` (embeddings of tokens) or `GradientAscent` (several steps and restarts).
2. Implement `name`, `threat`, `__call__` and, where it can be measured, `distance`.
3. Run the model inside `attacked(model)`, and check parameters and inputs with `require`.
4. Name it in `registry.ATTACKS`, and export it here.
5. Add it to `tests/robustness/attacks/test_contract.py`, which tests the contract of every attack.
"""

from hf_condlr.robustness.attacks.autoattack import AutoAttack
from hf_condlr.robustness.attacks.base import Attack
from hf_condlr.robustness.attacks.characters import CharacterAttack
from hf_condlr.robustness.attacks.corruptions import Corruption
from hf_condlr.robustness.attacks.embeddings import EmbeddingFGM, EmbeddingPGD, EmbeddingSearch
from hf_condlr.robustness.attacks.gradient import FGSM, PGD
from hf_condlr.robustness.attacks.pixels import PixelModel
from hf_condlr.robustness.attacks.registry import ATTACKS, make_attack, make_attacks, parse_epsilon
from hf_condlr.robustness.attacks.robustdlrt import L2FGSM, Jitter
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
