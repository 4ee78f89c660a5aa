"""What the caller measured, checked and in plain Python values, and as the Hub's `EvalResult`s."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult

from hf_condlr.errors import CondLRError
from hf_condlr.model_card.origin import is_hub_id


@dataclass(frozen=True)
class Attack:
    """Accuracy under one attack."""

    name: str
    parameters: dict[str, Any]
    accuracy: float

    def __str__(self) -> str:
        parameters = ", ".join(f"{name} {shown(value)}" for name, value in self.parameters.items())
        return f"{self.name} ({parameters})" if parameters else self.name


@dataclass(frozen=True)
class Measurements:
    """Metrics without an attack, and accuracies under attack, on one data set."""

    metrics: dict[str, Any]
    attacks: list[Attack]
    dataset: str | None

    @classmethod
    def of(
        cls, metrics: Mapping[str, Any] | None, robustness: Iterable[Mapping[str, Any]], dataset: str | None
    ) -> Measurements:
        """From the arguments of `write_model_card`.

        Raises:
            CondLRError: A value is no measurement: NaN, say, or an accuracy outside [0, 1].
        """
        values = {str(name): _plain(value) for name, value in (metrics or {}).items() if value is not None}
        for name, value in values.items():
            if not isinstance(value, (str, int, float)) or value in _NOT_FINITE:
                raise CondLRError(
                    "a metric must be a finite number, or a text such as '20.0 ± 1.2'",
                    received=f"{name}={value}",
                    remedy="Leave out what was not measured.",
                )
        return cls(values, [_attack(entry) for entry in robustness], dataset)

    def eval_results(self, task: str | None) -> list[EvalResult]:
        """Entries of the card's model index. They require a task and a data set: unknown ones are called so."""
        place: dict[str, Any] = {
            "task_type": task or "other",
            "dataset_type": self.dataset if self.dataset and is_hub_id(self.dataset) else "unknown",
            "dataset_name": self.dataset or "unknown",
        }
        clean = [EvalResult(metric_type=name, metric_value=value, **place) for name, value in self.metrics.items()]
        return clean + [
            EvalResult(
                metric_type="robust_accuracy",  # not `accuracy`: the Hub would rank it among clean ones
                metric_value=attack.accuracy,
                metric_name=f"Robust accuracy, {attack}",
                metric_config=attack.name,
                metric_args=attack.parameters or None,
                **place,
            )
            for attack in self.attacks
        ]


def shown(value: Any) -> str:
    """A number to four digits, anything else as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _attack(entry: Mapping[str, Any]) -> Attack:
    parameters = {str(key): _plain(value) for key, value in entry.items() if value is not None}
    name, accuracy = parameters.pop("attack", None), parameters.pop("accuracy", None)
    is_share = isinstance(accuracy, (int, float)) and not isinstance(accuracy, bool) and 0 <= accuracy <= 1
    if not isinstance(name, str) or not is_share:
        raise CondLRError(
            "an entry of robustness must state an attack's name and an accuracy in [0, 1]",
            received=f"attack={name!r}, accuracy={accuracy!r}",
            remedy="Write {'attack': 'pgd-linf', 'epsilon': 8 / 255, 'steps': 20, 'accuracy': 0.71}, say.",
        )
    return Attack(name, parameters, accuracy)


_NOT_FINITE = ("nan", "inf", "-inf")


def _plain(value: Any) -> Any:
    """As YAML can hold it: scalars of NumPy and torch, tuples and infinities are nothing that a safe loader reads."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if type(value) in (bool, int, float, str) else str(value)
