"""Options declared as fields of dataclasses, and their values in JSON."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any

from hf_condlr.errors import ConfigError, require


def option(default: Any, description: str, **metadata: Any) -> Any:
    """A field of a dataclass of options: its default, what `--help` says, and more metadata such as `choices`."""
    metadata |= {"help": description}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def is_number(kind: type, value: object) -> bool:
    """Whether the value is an int, or for kind=float any number; True and False are neither."""
    return isinstance(value, (int, kind)) and not isinstance(value, bool)


def as_tau(name: str, value: object) -> float:
    """τ as a number; "inf", as which strict JSON holds an infinite one, is a number too."""
    value = math.inf if value == "inf" else value
    valid = is_number(float, value) and value >= 0  # type: ignore[operator]  # NaN fails the comparison
    rule, remedy = f"{name} must be a number ≥ 0 or 'inf'", "tau = 0.1 bounds κ by 1.1."
    require(valid, rule, received=repr(value), remedy=remedy, error=ConfigError)
    return float(value)  # type: ignore[arg-type]


def as_list(value: Any) -> Any:
    """Sets in a fixed order, tuples and ranges as the lists that JSON gives back."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return list(value) if isinstance(value, (tuple, range)) else value


def tau_as_json(tau: float) -> float | str:
    """τ as a value of strict JSON, which has no infinity."""
    return "inf" if math.isinf(tau) else tau


def finite_json(value: Any) -> Any:
    """Measured values as strict JSON: None in place of a float that is not finite, tuples as lists."""
    if isinstance(value, dict):
        return {key: finite_json(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
