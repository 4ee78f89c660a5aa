"""Every exception of the package. Each message names the rule, the value received and the remedy."""

from __future__ import annotations

from collections.abc import Sequence


class CondLRError(Exception):
    """Base of all errors raised by `hf_condlr`; `str()` reads "rule; received value. Remedy."."""

    def __init__(self, rule: str, *, received: object, remedy: str) -> None:
        self.rule, self.received, self.remedy = rule, received, remedy
        super().__init__(f"{rule}; received {received}. {remedy}")

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments do not survive the default pickling
        return _rebuild, (type(self), self.rule, self.received, self.remedy)


def _rebuild(cls: type[CondLRError], rule: str, received: object, remedy: str) -> CondLRError:
    return cls(rule, received=received, remedy=remedy)


class ConfigError(CondLRError, ValueError):
    """A field of a config, or a combination of fields, contradicts the contract."""


class ConversionError(CondLRError, ValueError):
    """A module cannot be turned into its factored form, or nothing matches."""


class ConditioningError(CondLRError, ArithmeticError):
    """A core S has no condition number that could be bounded: it is zero or not finite."""


class ConvergenceError(CondLRError, ArithmeticError):
    """Every available factorisation of a matrix failed to converge."""


class OptimizerError(CondLRError, ValueError):
    """The manifold step cannot keep its guarantee with this optimizer, or this call of it."""


class DriftError(CondLRError, RuntimeError):
    """Processes that must hold equal factors hold different ones."""


class CheckpointError(CondLRError, ValueError):
    """A file of a checkpoint is missing, damaged, or belongs to another model."""


class MissingExtraError(CondLRError, ImportError):
    """An optional dependency is not installed."""


class AttackError(CondLRError, ValueError):
    """The parameters of an attack contradict each other or its inputs."""


class EvaluationError(CondLRError, ValueError):
    """A data set, or what is asked of it, does not fit an evaluation under attack."""


def require(
    condition: object, rule: str, *, received: object, remedy: str, error: type[CondLRError] = CondLRError
) -> None:
    """Raise `error` unless `condition` is true: "rule; received value. Remedy."."""
    if not condition:
        raise error(rule, received=received, remedy=remedy)


def listed(names: Sequence[str]) -> str:
    """List the first five names, and how many more there are, for a message."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
