"""`CondLRConfig`: which layers become W = U S Vᵀ, at which rank, and how well conditioned S has to stay.

Follows PEFT: a dataclass on `peft.PeftConfig` with `save_pretrained` and `from_pretrained`. Unlike there, an unknown
field is an error and the file is strict JSON, τ = ∞ included.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from hf_condlr.errors import ConfigError
from hf_condlr.linalg import CENTERS

PEFT_TYPE = "CONDLR"


ALL_LINEAR = "all-linear"


CHOICES = {
    "head": ("dense", "full_rank", "low_rank"),
    "rank_allocation": ("uniform", "energy", "fisher"),
    "center": CENTERS,
    "init_weights": ("svd", "randomized_svd", "activation_aware", "fisher", "orthogonal"),
    "trainable": ("all", "factors"),
}


@dataclass
class CondLRConfig(PeftConfig):
    """Robust low-rank training: κ(S) ≤ 1 + τ for every converted layer, once a warm-up of the bound is over.

    Exactly one of `r`, `rank_ratio`, `compression_ratio` is given. Every field is validated on construction, with a
    `ConfigError` (a `ValueError`) that names the rule, the value and the remedy.

    Example:
        >>> config = CondLRConfig(rank_ratio=0.25, tau=0.1)
        >>> config = CondLRConfig(target_modules=["query", "value"], r=16, tau_pattern={"value": "inf"})
    """

    target_modules: list[str] | str = field(
        default=ALL_LINEAR,
        metadata={
            "help": "Modules to convert, by PEFT's rules: 'all-linear' (every nn.Linear and Conv1D but the head), a "
            "list of name suffixes, or a regex for the whole name. Conv2d layers are converted when named."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone: a list of name suffixes, or a regex."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only layers with these indices; needs target_modules as a list."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the nn.ModuleList that layers_to_transform counts in."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that stay dense and trainable, whatever `trainable` says."}
    )
    head: Literal["dense", "full_rank", "low_rank"] = field(
        default="dense",
        metadata={
            "help": "Output embeddings and classifier: left alone, unless target_modules names them; factored at full "
            "rank and conditioned (the last layer in the paper); or like any other layer."
        },
    )
    r: int | None = field(default=None, metadata={"help": "Rank of every layer, at most min(in, out) of each."})
    rank_ratio: float | None = field(
        default=None, metadata={"help": "Rank as a share of min(in, out), rounded, at least 1; in (0, 1]."}
    )
    compression_ratio: float | None = field(
        default=None,
        metadata={"help": "Share of the converted layers' weights to remove, counted in the training form; in (0, 1)."},
    )
    rank_allocation: Literal["uniform", "energy", "fisher"] = field(
        default="uniform",
        metadata={
            "help": "How compression_ratio is spread: one rank ratio for all layers; the ranks that minimise the "
            "summed squared truncation error; or those that move the predictions of a fine-tuned model least, measured "
            "on calibration data."
        },
    )
    rank_multiple: int = field(
        default=1,
        metadata={
            "help": "Ranks that follow from a ratio are rounded down to multiples of it, but for smaller ones and the "
            "full one. Processors multiply multiples of 8 faster."
        },
    )
    rank_pattern: dict[str, int | float] = field(
        default_factory=dict,
        metadata={"help": "{name or regex: int rank or float rank_ratio}; the first match wins over the defaults."},
    )
    tau: float = field(
        default=0.1, metadata={"help": "Conditioning tolerance: κ(S) ≤ 1 + tau. 'inf' leaves S unconstrained."}
    )
    tau_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "{name or regex: tau}; the first match wins over `tau`."}
    )
    center: Literal["nearest", "rms", "mean"] = field(
        default="nearest",
        metadata={"help": "Interval that singular values are clipped to: nearest to S, or around their rms or mean."},
    )
    init_weights: Literal["svd", "randomized_svd", "activation_aware", "fisher", "orthogonal"] = field(
        default="svd",
        metadata={
            "help": "Start: truncated SVD, its randomized version for large layers, the SVD weighted by the inputs of "
            "each layer over calibration data or, for a fine-tuned model, by its gradients too, or random orthonormal "
            "factors (training from scratch)."
        },
    )
    conditioned_start: bool = field(
        default=False,
        metadata={
            "help": "Start from factors that obey κ ≤ 1 + tau, the best ones in the metric of the start, instead of "
            "letting a warm-up bring κ down."
        },
    )
    trainable: Literal["all", "factors"] = field(
        default="all",
        metadata={
            "help": "Leave requires_grad as it is, or freeze everything but U, S, V, the converted layers' biases and "
            "modules_to_save."
        },
    )
    peft_type: str = field(default=PEFT_TYPE, metadata={"help": "Always CONDLR."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
            setattr(self, name, _as_list(getattr(self, name)))
        for name in ("rank_pattern", "tau_pattern"):
            value = getattr(self, name)
            valid = isinstance(value, dict) and all(isinstance(key, str) for key in value)
            _require(valid, f"{name} must be a dict from names or regexes", repr(value), "Leave it out for none.")
        self.tau = _as_tau("tau", self.tau)
        self.tau_pattern = {key: _as_tau(f"tau_pattern[{key!r}]", value) for key, value in self.tau_pattern.items()}
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            _require(value in choices, f"{name} must be one of {', '.join(choices)}", repr(value), "Choose one.")
        started = isinstance(self.conditioned_start, bool)
        _require(started, "conditioned_start must be true or false", repr(self.conditioned_start), "Choose one.")
        self._validate_targets()
        self._validate_ranks()
        _require_peft_type(self.peft_type)

    def _validate_targets(self) -> None:
        for name, alone in (("target_modules", True), ("exclude_modules", True), ("modules_to_save", False)):
            value = getattr(self, name)
            names = [] if value is None or (alone and isinstance(value, str)) else value
            valid = isinstance(names, list) and all(isinstance(entry, str) for entry in names)
            allowed = "a regex or a list of names" if alone else "a list of names"
            _require(valid, f"{name} must be {allowed}", repr(value), "['classifier'], say.")
        indices = self.layers_to_transform
        listed = indices if isinstance(indices, list) else [] if indices is None else [indices]
        valid = all(_is_int(index) and index >= 0 for index in listed)
        _require(valid, "layers_to_transform must hold integers ≥ 0", repr(indices), "[0, 1], say.")
        if isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR:
            self.target_modules = ALL_LINEAR
        elif not self.target_modules:
            _require(
                False,
                "target_modules must name at least one module",
                repr(self.target_modules),
                f"Use {ALL_LINEAR!r}, a list of name suffixes, or a regex.",
            )
        _require(
            not (isinstance(self.target_modules, str) and self.layers_to_transform is not None),
            "layers_to_transform needs target_modules as a list of suffixes",
            f"target_modules={self.target_modules!r}",
            "List the suffixes, or put the indices into the regex.",
        )
        _require(
            not (self.layers_pattern is not None and self.layers_to_transform is None),
            "layers_pattern says where layers_to_transform counts",
            f"layers_pattern={self.layers_pattern!r} without layers_to_transform",
            "Give layers_to_transform too, or drop layers_pattern.",
        )
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                _require_regex(name, value)
        for name in ("rank_pattern", "tau_pattern"):
            for key in getattr(self, name):
                _require_regex(name, key)

    def _validate_ranks(self) -> None:
        given = [name for name in ("r", "rank_ratio", "compression_ratio") if getattr(self, name) is not None]
        _require(
            len(given) == 1,
            "exactly one of r, rank_ratio, compression_ratio must be given",
            " and ".join(f"{name}={getattr(self, name)}" for name in given) or "none of them",
            "Choose one; for instance rank_ratio=0.25.",
        )
        if self.r is not None:
            _require(_is_int(self.r) and self.r >= 1, "r must be an integer ≥ 1", repr(self.r), "Raise it.")
        if self.rank_ratio is not None:
            in_range = _is_number(self.rank_ratio) and 0 < self.rank_ratio <= 1
            _require(in_range, "rank_ratio must lie in (0, 1]", repr(self.rank_ratio), "For an integer rank use r.")
            self.rank_ratio = float(self.rank_ratio)
        if self.compression_ratio is not None:
            in_range = _is_number(self.compression_ratio) and 0 < self.compression_ratio < 1
            remedy = "It is the share removed: 0.6 keeps 40 % of the converted layers' weights."
            _require(in_range, "compression_ratio must lie in (0, 1)", repr(self.compression_ratio), remedy)
        _require(
            self.rank_allocation == "uniform" or self.compression_ratio is not None,
            f"rank_allocation={self.rank_allocation!r} spreads a compression_ratio",
            given[0] + " instead",
            "Give compression_ratio, or leave rank_allocation at 'uniform'.",
        )
        multiple = self.rank_multiple
        _require(_is_int(multiple) and multiple >= 1, "rank_multiple must be an integer ≥ 1", repr(multiple), "8, say.")
        _require(
            multiple == 1 or self.r is None,
            "rank_multiple rounds ranks that follow from a ratio",
            f"rank_multiple={multiple} and r={self.r}",
            "Give r as the multiple that it should be, and leave rank_multiple out.",
        )
        for key, value in self.rank_pattern.items():
            valid = (_is_int(value) and value >= 1) or (isinstance(value, float) and 0 < value <= 1)
            rule = "rank_pattern values must be integers ≥ 1 (ranks) or floats in (0, 1] (rank ratios)"
            _require(valid, rule, f"{key!r}: {value!r}", "Write 8 for a rank, 0.25 for a ratio.")

    @property
    def needs_calibration_data(self) -> bool:
        """Whether the start or the ranks depend on data: `activation_aware` or `fisher`."""
        return self.init_weights in ("activation_aware", "fisher") or self.rank_allocation == "fisher"

    def to_dict(self) -> dict[str, Any]:
        """The fields as strict JSON values: an infinite τ is the string "inf"."""
        values = super().to_dict()
        values["tau"] = _as_json(self.tau)
        values["tau_pattern"] = {key: _as_json(value) for key, value in self.tau_pattern.items()}
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`. In the order of the fields: PEFT would sort patterns, whose first match wins."""
        os.makedirs(save_directory, exist_ok=True)
        path = os.path.join(save_directory, CONFIG_NAME)
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> CondLRConfig:
        """Build the config from the fields of a file; `from_pretrained` ends here. Unknown fields are an error."""
        _require_peft_type(kwargs.get("peft_type", PEFT_TYPE))
        unknown = sorted(set(kwargs) - {f.name for f in fields(cls)})
        _require(
            not unknown,
            "a CondLRConfig file must hold its fields only",
            f"unknown {', '.join(unknown)}",
            "Remove them, or upgrade hf_condlr if the file comes from a newer version.",
        )
        return cls(**kwargs)


def _require(condition: bool, rule: str, received: object, remedy: str) -> None:
    if not condition:
        raise ConfigError(rule, received=received, remedy=remedy)


def _require_regex(name: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{name} must hold valid regexes", received=repr(pattern), remedy=f"{error}.") from error


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _as_tau(name: str, value: object) -> float:
    value = math.inf if value == "inf" else value
    valid = _is_number(value) and value >= 0  # type: ignore[operator]  # NaN fails the comparison
    _require(valid, f"{name} must be a number ≥ 0 or 'inf'", repr(value), "tau = 0.1 bounds κ by 1.1.")
    return float(value)  # type: ignore[arg-type]


def _as_list(value: Any) -> Any:
    """Sets in a fixed order, tuples and ranges as lists: what JSON gives back."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, (tuple, range)) else value


def _require_peft_type(value: object) -> None:
    remedy = "This file configures another PEFT method: load it with peft."
    _require(value == PEFT_TYPE, f"peft_type must be {PEFT_TYPE}", repr(value), remedy)


def _as_json(tau: float) -> float | str:
    return "inf" if math.isinf(tau) else tau
