"""`AutoAttack` (Croce and Hein 2020, arXiv 2003.01690), by the optional package `pyautoattack`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_condlr.errors import MissingExtraError
from hf_condlr.robustness.attacks.ball import BallAttack, Norm
from hf_condlr.robustness.attacks.base import at_least_float32, attacked, logits_of, require, require_images
from hf_condlr.robustness.attacks.losses import classes, is_correct

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
FEW_CLASSES = ("apgd-ce", "fab", "square")
# How many classes each needs: the DLR loss takes the third largest logit, the targeted one the fourth.
LEAST_CLASSES = {"apgd-ce": 2, "apgd-dlr": 3, "apgd-t": 4, "fab": 2, "fab-t": 2, "square": 2}


@dataclass(frozen=True)
class AutoAttack(BallAttack):
    """A fixed set of attacks in turn, each on the samples that resisted the ones before: the standard benchmark.

    Standard: APGD-CE and targeted APGD-DLR (100 steps), targeted FAB (100 steps), Square (5000 queries), against
    min(9, C − 1) target classes. With 2 or 3 classes, for which the targeted DLR loss is not defined: APGD-CE and FAB
    with five restarts each, and Square. A sample that resists all of them is returned unchanged.

    Needs `pip install 'hf_condlr[autoattack]'`. That package's logger, `auto-attack`, warns of randomised models,
    probabilities in place of logits, zero gradients, and a Square attack that was stronger than the gradient attacks.

    Args:
        epsilon: Radius, in pixels of [0, 1].
        norm: `linf` or `l2`.
        attacks: Attacks to run, in order, among `apgd-ce`, `apgd-dlr`, `apgd-t`, `fab`, `fab-t` and `square`; None for
            the standard ones. Accuracy under any other choice must not be called AutoAttack's.
        seed: Seed of its random numbers.
    """

    epsilon: float
    norm: Norm = "linf"
    attacks: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attacks is not None:
            known, rule = {*self.attacks} <= {*LEAST_CLASSES}, f"attacks must be some of {', '.join(LEAST_CLASSES)}"
            received = ", ".join(self.attacks) or "none"
            require(known and self.attacks, rule, received, "None chooses the standard ones.")
            object.__setattr__(self, "attacks", tuple(self.attacks))  # YAML gives a list

    @property
    def name(self) -> str:
        return f"autoattack-{self.norm}" + ("" if self.attacks is None else f"({', '.join(self.attacks)})")

    def __call__(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images (B, C, H, W), in at least float32.

        Raises:
            AttackError: The inputs are not images, or too small for Square; the attacks need more classes; or a
                gradient is not finite: pyautoattack would not move in ℓ∞, and count NaN as a success in ℓ2.
            MissingExtraError: pyautoattack is not installed; an `ImportError`.
        """
        try:
            from pyautoattack import AutoAttack as build
        except ImportError as error:
            remedy = "pip install 'hf_condlr[autoattack]'."
            raise MissingExtraError(
                "AutoAttack needs pyautoattack", received="no such package", remedy=remedy
            ) from error
        require_images(inputs)
        x0, labels = at_least_float32(inputs).clone(), classes(labels).long()
        x = x0.float().contiguous()  # its views fail on memory in channels-last order

        def logits(x: Tensor) -> Tensor:  # (k, C, H, W) -> (k, classes), a copy, since Square writes into it
            if x.requires_grad:
                x = x.view_as(x)
                x.register_hook(require_finite)
            return logits_of(model(x)).float().clone()

        with attacked(model), contained(model):
            with torch.no_grad():
                clean = logits(x)
            going = is_correct(clean, labels).nonzero()[:, 0]
            if self.epsilon > 0 and len(going):
                attack = build(logits, **self._options(clean, inputs), norm={"linf": "Linf", "l2": "L2"}[self.norm])
                attack.verbose = False
                # What its standard version sets; its nine target classes fail with fewer than ten classes.
                attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, clean.shape[1] - 1)
                attack.apgd.n_restarts = attack.fab.n_restarts = 5 if tuple(attack.attacks_to_run) == FEW_CLASSES else 1
                found, _ = attack.run_standard_evaluation(x[going], labels[going], batch_size=len(going))
                changed = (found != x[going]).flatten(1).any(1)  # else as they were, in float64 too
                x0 = x0.index_copy(0, going[changed], found[changed].to(x0))
        return x0

    def _options(self, clean: Tensor, inputs: Tensor) -> dict[str, Any]:
        """Options of pyautoattack's constructor; refuses a combination that would fail later."""
        count, height = clean.shape[1], inputs.shape[2]
        names = self.attacks or (STANDARD if count >= LEAST_CLASSES["apgd-t"] else FEW_CLASSES)
        least = max(LEAST_CLASSES[name] for name in names)
        remedy = f"Choose others with attacks=, such as {', '.join(FEW_CLASSES)}."
        require(count >= least, f"{', '.join(names)} must be given at least {least} classes", count, remedy)
        small = self.norm == "l2" and "square" in names and height < 5
        require(not small, "its Square attack in ℓ2 must be given images of at least 5 rows", height, remedy)
        options = {"attacks": list(names), "version": "custom", "device": inputs.device}
        return {**options, "eps": float(self.epsilon), "seed": self.seed}


def require_finite(gradient: Tensor) -> None:
    """Hook on the inputs."""
    remedy = "Correct the model, or use Square, which needs no gradient."
    require(gradient.isfinite().all(), "the model must have finite gradients", "infinite or NaN", remedy)


@contextmanager
def contained(model: nn.Module) -> Iterator[None]:
    """Undo the side effects of pyautoattack that `attacked` does not.

    FAB adds to the gradients of the parameters, its check for dynamic models removes a debugger's trace function, and
    every attack seeds the current CUDA device, even for a model on the CPU.
    """
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trace = sys.gettrace()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            yield
    finally:
        sys.settrace(trace)
        for parameter in learning:
            parameter.requires_grad_(True)
