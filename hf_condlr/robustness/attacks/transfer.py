"""`Transfer`: an attack made on another model than the attacked one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Self

import torch
from torch import Tensor, nn

from hf_condlr.robustness.attacks.ball import per_sample
from hf_condlr.robustness.attacks.base import Attack, Inputs, attacked, logits_of, require
from hf_condlr.robustness.attacks.losses import is_correct


@dataclass(frozen=True)
class Transfer(Attack):
    """x' = attack(source, x, y), where the attacked model classifies x correctly; else x.

    A model that resists white-box attacks but not this one is not robust: its gradients are masked.

    `early_stop` is switched off: an example just beyond the source's decision boundary is rarely beyond another's.

    Args:
        attack: An attack on pixels or texts; a perturbation of embeddings has no meaning for another model.
        source: The model that examples are made on. It takes the same inputs as the attacked one, with its own
            normalisation inside, and gives logits of the same classes.
    """

    attack: Attack
    source: nn.Module
    threat = property(attrgetter("attack.threat"))
    epsilon = property(attrgetter("attack.epsilon"))
    takes = property(attrgetter("attack.takes"))
    within_bounds = property(attrgetter("attack.within_bounds"))

    def __post_init__(self) -> None:
        rule = "attack must change pixels or texts"
        require(self.attack.takes != "tokens", rule, self.attack.name, "Embeddings of another model have no meaning.")
        require(self.attack.adversarial, "attack must be adversarial", self.attack.name, "It needs no source: run it.")
        if getattr(self.attack, "early_stop", False):
            object.__setattr__(self, "attack", replace(self.attack, early_stop=False))  # type: ignore[type-var]

    @property
    def name(self) -> str:
        return f"transfer-{self.attack.name}"

    def __call__(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> Inputs:
        """Adversarial inputs of the same kind."""
        adversarial = self.attack(self.source, inputs, labels)
        with attacked(model), torch.no_grad():  # an attack never corrects an error
            correct = is_correct(logits_of(model(inputs)), labels)
        if isinstance(inputs, Tensor):
            return torch.where(per_sample(correct, inputs), adversarial, inputs.to(adversarial))
        return [new if kept else old for new, old, kept in zip(adversarial, inputs, correct.tolist(), strict=True)]

    def distance(self, model: nn.Module, inputs: Inputs, adversarial: Inputs) -> Tensor | None:
        """The attack's distance on the source, whose normalisation defines the units."""
        return self.attack.distance(self.source, inputs, adversarial)

    def with_epsilon(self, epsilon: float) -> Self:
        return replace(self, attack=self.attack.with_epsilon(epsilon))

    def reseeded(self, index: int) -> Self:
        return replace(self, attack=self.attack.reseeded(index))

    def settings(self) -> dict[str, Any]:
        """The attack's settings, and the name of the source."""
        return {**self.attack.settings(), "attack": self.name, "source": name_of(self.source)}


def name_of(model: nn.Module) -> str:
    """Name or path that a transformers model was loaded from, also inside a `PixelModel`; else its class's name."""
    inner = getattr(model, "model", model)
    return getattr(getattr(inner, "config", None), "_name_or_path", "") or type(inner).__name__
