"""Checks whose errors are one line for a user of a script."""

from __future__ import annotations

from hf_condlr.errors import ConfigError, EvaluationError, require


def check(valid: bool, rule: str, received: object, remedy: str) -> None:
    """Raise a `ConfigError` unless an option is valid."""
    require(valid, rule, received=received, remedy=remedy, error=ConfigError)


def check_data(valid: bool, rule: str, received: object, remedy: str) -> None:
    """Raise an `EvaluationError` unless the data are valid."""
    require(valid, rule, received=received, remedy=remedy, error=EvaluationError)
