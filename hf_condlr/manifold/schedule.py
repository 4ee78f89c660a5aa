"""The schedule of the bound on κ(S): from what each layer starts with to 1 + τ, geometrically, within a warm-up.

Conditioning pretrained weights at once would discard what they have learnt (arXiv 2306.01485 trains from scratch).
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

from torch import Tensor

from hf_condlr.distributed.replicas import from_first_process
from hf_condlr.distributed.shards import full_tensor
from hf_condlr.errors import OptimizerError, listed, require
from hf_condlr.layers import LowRankLayer
from hf_condlr.linalg import condition_number

MAX_INITIAL_CONDITION = 1e4

Number = TypeVar("Number", float, Tensor)


def bound_at(initial: Number, final: Number, progress: float) -> Number:
    """κ_0^{1−p} (1+τ)^p: the bound on κ(S) in force.

    Args:
        initial: κ_0, or one for each layer.
        final: 1 + τ, or one for each layer.
        progress: p = min(1, t/T_w).
    """
    return initial ** (1 - progress) * final**progress


class BoundSchedule:
    """The bound on κ(S) of each layer after step t: 1 + τ(t) = κ_0^{1−p} (1+τ)^p with p = min(1, t/T_w).

    Args:
        layers: The factored layers; their `tau` is read whenever a bound is asked for.
        warmup_steps: T_w ≥ 0, in optimizer steps. With 0 the first step conditions to 1 + τ.

    Attributes:
        initial_condition: {layer: κ_0}, what κ(S) is at construction, clipped to [1 + τ, 10⁴].

    Raises:
        OptimizerError: `warmup_steps` is not an integer ≥ 0.
    """

    def __init__(self, layers: dict[str, LowRankLayer], warmup_steps: int) -> None:
        require_count("warmup_steps", warmup_steps, 0, "0 conditions at once.")
        self.layers, self.warmup_steps = layers, warmup_steps
        self.initial_condition = {
            name: min(max(kappa_of(layer), 1 + layer.tau), MAX_INITIAL_CONDITION) for name, layer in layers.items()
        }

    def progress(self, step: int) -> float:
        """p = min(1, t/T_w) after step t."""
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0

    def bounds(self, step: int) -> dict[str, float]:
        """{layer: 1 + τ(t)} after step t; inf where τ is."""
        p = self.progress(step)
        return {
            name: math.inf if math.isinf(final) else bound_at(initial, final, p)
            for name, (initial, final) in self.endpoints().items()
        }

    def endpoints(self) -> dict[str, tuple[float, float]]:
        """{layer: (κ_0, 1 + τ)}, where the bound starts and where it ends."""
        return {name: (self.initial_condition[name], 1 + layer.tau) for name, layer in self.layers.items()}

    def start_from_first_process(self) -> None:
        """Take over κ_0 from process 0. Every process must call it."""
        device = next(iter(self.layers.values())).S.device
        self.initial_condition = from_first_process(self.initial_condition, device)

    def state_dict(self) -> dict[str, Any]:
        """T_w and each layer's κ_0, as plain numbers."""
        return {"warmup_steps": self.warmup_steps, "initial_condition": dict(self.initial_condition)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the schedule of a handle's `state_dict`. Nothing changes if it is refused.

        Raises:
            OptimizerError: The state is of other layers, or its numbers are out of range.
        """
        missing = {"step_count", "warmup_steps", "initial_condition"} - set(state if isinstance(state, dict) else ())
        require(
            not missing,
            "the state must be that of a manifold step",
            received=f"no {listed(sorted(missing))}",
            remedy="Load what state_dict() of the handle returned.",
            error=OptimizerError,
        )
        require_count("step_count", state["step_count"], 0, "Load a state that state_dict() made.")
        warmup_steps, initial = state["warmup_steps"], state["initial_condition"]
        require_count("warmup_steps", warmup_steps, 0, "Load a state that state_dict() made.")
        require(
            isinstance(initial, dict),
            "initial_condition must be a dict {layer: κ_0}",
            received=repr(initial),
            remedy="Load a state that state_dict() made.",
            error=OptimizerError,
        )
        others = sorted(map(str, set(self.layers) ^ set(initial)))
        require(
            not others,
            "the state must name the layers of this model",
            received=f"a difference in {listed(others)}",
            remedy="Convert the model with the config that the state was saved with.",
            error=OptimizerError,
        )
        numbers = {name: kappa if type(kappa) in (int, float) else math.nan for name, kappa in initial.items()}
        wrong = [f"{n}: {initial[n]}" for n, kappa in numbers.items() if not 1 <= kappa <= MAX_INITIAL_CONDITION]
        require(
            not wrong,
            f"the bound on κ must start between 1 and {MAX_INITIAL_CONDITION:g} in every layer",
            received=listed(wrong),
            remedy="Load a state that state_dict() made.",
            error=OptimizerError,
        )
        self.warmup_steps = warmup_steps
        self.initial_condition = {name: float(kappa) for name, kappa in initial.items()}


def kappa_of(layer: LowRankLayer) -> float:
    """κ(S) of a layer, inf for S = 0. Gathers a sharded S: every process must call it."""
    kappa = condition_number(full_tensor(layer.S)).item()
    return math.inf if math.isnan(kappa) else kappa


def require_count(name: str, value: object, least: int, remedy: str) -> None:
    """Raise OptimizerError unless `value` is an integer ≥ `least`."""
    require(
        isinstance(value, int) and not isinstance(value, bool) and value >= least,
        f"{name} must be an integer ≥ {least}",
        received=repr(value),
        remedy=remedy,
        error=OptimizerError,
    )
