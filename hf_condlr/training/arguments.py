"""`CondLRTrainingArguments`: what robust low-rank training adds to transformers' `TrainingArguments`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from hf_condlr.errors import ConfigError, require
from hf_condlr.options import option
from hf_condlr.robustness.attacks.base import Attack
from hf_condlr.robustness.attacks.registry import make_attacks, parse_epsilon


@dataclass
class AdversarialArguments:
    """How `AdversarialTraining` perturbs the batches of a training, in the Trainer or in your own loop."""

    adversarial_attack: str = option(
        "none", "none, fgsm or pgd: on pixels, or for texts on the embeddings, where fgsm is FGM."
    )
    adversarial_epsilon: float | str | None = option(
        None,
        "Radius at its largest, a number or a fraction such as 8/255: in pixels of [0, 1]; for texts a "
        "share of each token's embedding norm.",
    )
    adversarial_norm: str | None = option(None, "linf (for pixels the default) or l2; texts have no choice.")
    adversarial_steps: int | None = option(None, "Gradient steps of pgd; by default 7.")
    adversarial_share: float = option(1.0, "Share of each batch that is replaced by adversarial samples, in (0, 1].")
    adversarial_schedule: str = option(
        "ramp",
        "ramp: epsilon is 0 for the first quarter of the training and rises linearly until three quarters; constant.",
    )
    trades_beta: float = option(
        0.0, "β of TRADES, loss(x) + β KL(p(x) ‖ p(x')); 0 trains on the loss of x'. Needs pgd."
    )
    adversarial_image_mean: list[float] | None = option(
        None, "Mean that images are normalised with, if there is no image processor."
    )
    adversarial_image_std: list[float] | None = option(
        None, "Standard deviation that images are normalised with; goes with the mean."
    )

    def __post_init__(self) -> None:
        if hasattr(super(), "__post_init__"):
            super().__post_init__()  # type: ignore[misc]
        attack, is_pgd = self.adversarial_attack, self.adversarial_attack == "pgd"
        self._require(attack in ("none", "fgsm", "pgd"), "adversarial_attack", "be none, fgsm or pgd")
        if attack == "none":
            for option in AdversarialArguments.__dataclass_fields__.values():
                is_default = getattr(self, option.name) == option.default
                self._require(is_default, option.name, "be left alone without an attack", "Set adversarial_attack.")
            return
        given, norm, steps = self.adversarial_epsilon is not None, self.adversarial_norm, self.adversarial_steps
        example = "For example 8/255 for pixels, 0.1 for texts."
        self._require(given, "adversarial_epsilon", f"be given with {attack}", example)
        self.adversarial_epsilon = parse_epsilon(self.adversarial_epsilon)  # type: ignore[arg-type]
        self._require(0 < self.adversarial_epsilon < math.inf, "adversarial_epsilon", "be > 0 and finite")
        self._require(norm in (None, "linf", "l2"), "adversarial_norm", "be linf or l2")
        self._require(is_pgd or norm != "l2", "adversarial_norm", "be linf with fgsm", "Use pgd.")
        self._require(steps is None or steps >= 1, "adversarial_steps", "be ≥ 1")
        self._require(is_pgd or steps is None, "adversarial_steps", "be left alone with fgsm, which is one", "Use pgd.")
        self._require(0 < self.adversarial_share <= 1, "adversarial_share", "lie in (0, 1]")
        self._require(self.adversarial_schedule in ("ramp", "constant"), "adversarial_schedule", "be ramp or constant")
        self._require(0 <= self.trades_beta < math.inf, "trades_beta", "be ≥ 0 and finite")
        if self.trades_beta:
            at_x = "At x itself, where fgsm starts, the divergence has no gradient."
            self._require(is_pgd, "trades_beta", "be 0 with fgsm", at_x)
            rule = "be 1 with TRADES, which sees every sample twice"
            self._require(self.adversarial_share == 1, "adversarial_share", rule)
        mean, std = self.adversarial_image_mean, self.adversarial_image_std
        self._require((mean is None) == (std is None), "adversarial_image_std", "be given with the mean, or neither")
        self._require(std is None or min(std, default=0) > 0, "adversarial_image_std", "be > 0")

    def _require(self, valid: bool, name: str, rule: str, remedy: str = "See its help.") -> None:
        require(valid, f"{name} must {rule}", received=getattr(self, name), remedy=remedy, error=ConfigError)


@dataclass
class CondLRArguments(AdversarialArguments):
    """Options that robust low-rank training adds to `TrainingArguments`."""

    conditioning_warmup_ratio: float = option(
        0.3, "Share of the training over which the bound on κ falls to 1 + tau; 0 conditions at once."
    )
    metric_scaling: bool | None = option(
        None, "Divide the gradients of U and V by ‖S‖²_F/r; by default on for SGD, off for other optimizers."
    )
    projection_interval: int = option(
        1,
        "Retract U and V and condition S after every k-th optimizer step, and before each evaluation, "
        "saving and the end of the training; between these κ is not bounded.",
    )
    drift_check_interval: int = option(
        100,
        "Of several processes, compare the factors after the first optimizer step and after every k-th, "
        "bit for bit, and stop all of them where they differ; 0 never.",
    )
    distillation_weight: float = option(
        0.0, "Weight λ of the teacher in (1 − λ) loss + λ distillation loss, in [0, 1]; needs a teacher."
    )
    distillation_temperature: float = option(
        2.0, "Temperature T that divides both logits in the distillation loss, except for regression."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.conditioning_warmup_ratio <= 1, "conditioning_warmup_ratio", "lie in [0, 1]")
        self._require(self.projection_interval >= 1, "projection_interval", "be an integer ≥ 1")
        self._require(self.drift_check_interval >= 0, "drift_check_interval", "be an integer ≥ 0")
        self._require(0 <= self.distillation_weight <= 1, "distillation_weight", "lie in [0, 1]")
        self._require(self.distillation_temperature > 0, "distillation_temperature", "be > 0")
        check_evaluation_dtype(self)


def check_evaluation_dtype(args: Any) -> None:
    """Refuse arguments with which Trainer rounds the model to half precision for an evaluation."""
    for name in ("bf16_full_eval", "fp16_full_eval"):
        require(
            not getattr(args, name, False),
            f"{name} must be off: rounding breaks the bound",
            received=True,
            remedy="Evaluate under autocast (bf16=True or fp16=True), which leaves the weights alone.",
            error=ConfigError,
        )


@dataclass
class CondLRTrainingArguments(CondLRArguments, TrainingArguments):
    """`TrainingArguments` and `CondLRArguments`."""


@dataclass
class CondLRSeq2SeqTrainingArguments(CondLRArguments, Seq2SeqTrainingArguments):
    """`Seq2SeqTrainingArguments` and `CondLRArguments`."""


@dataclass
class RobustnessArguments:
    """Attacks that each `evaluate()` of `CondLRTrainer(..., robustness=RobustnessArguments(...))` ends with."""

    attacks: list[str] = option(
        ["pgd-linf"], "Names of attacks in hf_condlr.robustness.attacks.ATTACKS: pgd-linf, pgd-embedding, ..."
    )
    epsilons: list[str] = option(
        ["8/255"], "Budgets of each attack, numbers or fractions: for example 8/255 for pixels, 0.1 for embeddings."
    )
    steps: int | None = option(None, "Gradient steps, of the attacks that have them.")
    restarts: int | None = option(None, "Restarts, of the attacks that have them.")
    max_samples: int | None = option(256, "Number of samples that are attacked, always the same ones.")
    batch_size: int | None = option(
        None, "Samples that are attacked at once; by default the batch size of the evaluation."
    )

    def __post_init__(self) -> None:
        for name in ("max_samples", "batch_size"):
            value = getattr(self, name)
            valid = value is None or value >= 1
            require(valid, f"{name} must be ≥ 1", received=value, remedy="See its help.", error=ConfigError)
        self.build()

    def build(self) -> list[Attack]:
        """The attacks, each with every budget.

        Raises:
            AttackError: An unknown name, a value that an attack does not take, or an option that none of them has.
        """
        options: dict[str, Any] = {"steps": self.steps, "restarts": self.restarts}
        return make_attacks(self.attacks, self.epsilons, **options)
