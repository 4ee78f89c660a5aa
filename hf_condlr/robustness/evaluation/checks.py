"""`Check`: a sign that an attack failed where a model did not resist, looked for by every trusted evaluation.

After Athalye et al. 2018 (obfuscated gradients) and Carlini et al. 2019 (on evaluating adversarial robustness).
`outcome_checks.py` looks at the outcomes of all samples, `model_checks.py` at the attacked model, and
`attack_checks.py` attacks some samples again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from hf_condlr.robustness.attacks.base import Inputs


@dataclass
class Check:
    """One check and what it found; `passed` is None where it does not apply."""

    name: str
    passed: bool | None
    found: str
    suspicion: str
    """What a failure means."""

    def __str__(self) -> str:
        state = {True: "passed", False: "FAILED", None: "not applicable"}[self.passed]
        return f"{state}: {self.name}: {self.found}" + (f". {self.suspicion}" if self.passed is False else "")


@dataclass
class CheckBatch:
    """Samples that are checked: their positions in the evaluation, inputs and labels."""

    positions: list[int]
    inputs: Inputs
    labels: Tensor


def allowed(samples: int, share: float) -> int:
    """Number of samples that may disagree: a share of them, rounded up."""
    return math.ceil(share * samples)
