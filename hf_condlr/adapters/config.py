"""`CondLRAdapterConfig`: which frozen layers get an update s U S Vᵀ, of which rank, and how well conditioned."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from peft import PeftConfig, PeftType

from hf_condlr.adapters.registration import PEFT_TYPE
from hf_condlr.config import ALL_LINEAR
from hf_condlr.errors import ConfigError, require
from hf_condlr.options import as_list, as_tau, option, tau_as_json

_BOUND = "κ(S) would say nothing about the update"
REFUSED = {
    "lora_alpha": "Use scale: U and V are orthonormal, so that the update needs no factor that depends on r",
    "use_rslora": "Use scale: U and V are orthonormal, so that the update needs no factor that depends on r",
    "alpha_pattern": "Use scale, or give adapters of different scales different names",
    "lora_dropout": "The bound on κ regularises the update; dropout in the model stays",
    "use_dora": f"DoRA rescales the rows of W, and {_BOUND}",
    "init_lora_weights": "Updates start at zero; for bases from a gradient call start_from_gradient",
    "bias": "Name the modules whose biases train in modules_to_save",
    "lora_bias": "Name the modules whose biases train in modules_to_save",
    "target_parameters": "Only linear layers are adapted",
    "trainable_token_indices": "Name the embeddings in modules_to_save",
    "fan_in_fan_out": "Conv1D is recognised by its type",
}
"""Options of LoRA that users may try, and what to do instead."""


@dataclass
class CondLRAdapterConfig(PeftConfig):
    """A method of PEFT: y = W₀x + s U S Vᵀx with W₀ frozen, U and V orthonormal and κ(S) ≤ 1 + τ.

    `attach_manifold_step`, `CondLRTrainer` or `CondLRCallback` keeps the constraint; everything else is PEFT's. An
    update starts at zero to rounding: S = 2⁻⁴⁰ Q, Q orthogonal, has κ = 1 at a scale that float32 does not resolve next
    to W₀. So the adapter alone is saved, and belongs on the unchanged base model.

    Examples:
        >>> model = peft.get_peft_model(base, CondLRAdapterConfig(r=16, tau=0.1))
        >>> trainer = CondLRTrainer(model, args, train_dataset=data)
    """

    r: int = option(16, "Rank of every update, at most min(in, out) of its layer.")
    tau: float = option(0.1, "Conditioning tolerance: κ(S) ≤ 1 + tau. 'inf' leaves S unconstrained.")
    scale: float = option(1.0, "s > 0. ‖s U S Vᵀ‖ = s σ_max(S), whatever the rank.")
    target_modules: list[str] | str = option(
        ALL_LINEAR,
        "Linear and Conv1D layers to adapt, by PEFT's rules: 'all-linear' (all but the head), name suffixes, a regex.",
    )
    exclude_modules: list[str] | str | None = option(None, "Modules to leave alone: name suffixes, or a regex.")
    layers_to_transform: list[int] | int | None = option(
        None, "Only layers of these indices; needs a list of target_modules."
    )
    layers_pattern: list[str] | str | None = option(None, "Name of the ModuleList that layers_to_transform counts in.")
    rank_pattern: dict[str, int] = option({}, "{name or regex: rank}; the first match wins over r.")
    modules_to_save: list[str] | None = option(
        None, "Modules that train as they are and are saved with the adapter, such as a new classifier."
    )
    peft_type: Any = field(default=PEFT_TYPE, metadata={"help": f"Always {PEFT_TYPE}."})

    def __new__(cls, *args: Any, **kwargs: Any) -> CondLRAdapterConfig:
        """Refuse options of LoRA by name, before the dataclass refuses them without a reason."""
        for name in kwargs.keys() & REFUSED.keys():
            rule = "a CondLRAdapterConfig has the options that apply to U S Vᵀ"
            raise ConfigError(rule, received=f"{name}={kwargs[name]!r}", remedy=f"{REFUSED[name]}.")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = f"peft_type must be {PEFT_TYPE}"
        remedy = "Load adapters of other methods by peft.PeftConfig."
        require(self.peft_type == PEFT_TYPE, rule, received=repr(self.peft_type), remedy=remedy, error=ConfigError)
        self.peft_type = PeftType(PEFT_TYPE)
        self.tau = as_tau("tau", self.tau)
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
            setattr(self, name, as_list(getattr(self, name)))
        self._check("target_modules", bool(self.target_modules), f"name layers; {ALL_LINEAR!r} takes all linear ones")
        self._check("r", _is_rank(self.r), "be an integer ≥ 1")
        pattern = self.rank_pattern
        valid = isinstance(pattern, dict) and all(isinstance(k, str) and _is_rank(v) for k, v in pattern.items())
        self._check("rank_pattern", valid, "map names or regexes to integers ≥ 1")
        valid = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        self._check("scale", valid and 0 < self.scale < float("inf"), "be a finite number > 0")
        by_index = self.layers_to_transform is not None
        valid = not by_index or isinstance(self.target_modules, list)
        self._check("layers_to_transform", valid, "come with a list of target_modules")
        self._check("layers_pattern", by_index or self.layers_pattern is None, "come with layers_to_transform")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as strict JSON values in a fixed order; an infinite τ is the string "inf"."""
        values = {name: sorted(v) if isinstance(v, set) else v for name, v in super().to_dict().items()}
        return values | {"tau": tau_as_json(self.tau)}

    def _check(self, name: str, valid: bool, rule: str) -> None:
        helps = {f.name: f.metadata["help"] for f in fields(self)}
        require(valid, f"{name} must {rule}", received=repr(getattr(self, name)), remedy=helps[name], error=ConfigError)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
