"""Robust accuracy and attack success rate as metrics of `evaluate`: without a network, in one process or several.

Predictions are class numbers. `num_process`, `process_id` and `experiment_id` are those of `evaluate.Metric`: each
process adds its own samples; `compute` returns the result over all of them in process 0, and None in the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hf_condlr.errors import EvaluationError, require


class RobustAccuracy(evaluate.Metric):
    """Share of the samples that are classified correctly under an attack.

    The adversary may also leave a sample as it is: a sample that is misclassified without the attack is not robust,
    even if the attack corrects it. Attacks that keep each sample's worst iterate ensure that themselves. For others,
    FGSM among them, `RobustAccuracy("with_clean")` also takes `clean_predictions`, and a sample counts only where both
    predictions are right.

    Args:
        config_name: None for predictions under attack and references; `with_clean` for the clean predictions as well.
        options: Options of `evaluate.Metric`.

    Examples:
        >>> RobustAccuracy().compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
        {'robust_accuracy': 0.75}
        >>> attacked, clean, labels = [0, 1, 1, 0], [0, 1, 0, 2], [0, 1, 0, 0]
        >>> RobustAccuracy("with_clean").compute(
        ...     predictions=attacked, references=labels, clean_predictions=clean
        ... )
        {'robust_accuracy': 0.5}
    """

    def __init__(self, config_name: str | None = None, **options: Any) -> None:
        known, rule = config_name in (None, "default", "with_clean"), "config_name must be None or 'with_clean'"
        require(known, rule, received=repr(config_name), remedy="Choose one.", error=EvaluationError)
        super().__init__(config_name, **options)

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of the samples that are robust.", with_clean=self.config_name == "with_clean")

    def _compute(
        self, *, predictions: Sequence[int], references: Sequence[int], clean_predictions: Sequence[int] | None = None
    ) -> dict[str, float]:
        known = clean_predictions is None or self.config_name == "with_clean"  # evaluate passes on unknown names
        rule, received = "RobustAccuracy() takes predictions under attack and references", "clean_predictions as well"
        require(known, rule, received=received, remedy="Use RobustAccuracy('with_clean').", error=EvaluationError)
        clean = references if clean_predictions is None else clean_predictions
        return {self.name: _share([a == c == y for a, c, y in zip(predictions, clean, references, strict=True)])}


class AttackSuccessRate(evaluate.Metric):
    """Share of the samples classified correctly without an attack that the attack turned into errors.

    It is 1 − `RobustAccuracy("with_clean")`/clean accuracy; nan where no sample is classified correctly without the
    attack.

    Examples:
        >>> attacked, clean, labels = [0, 1, 1, 0], [0, 1, 0, 2], [0, 1, 0, 0]
        >>> AttackSuccessRate().compute(predictions=attacked, references=labels, clean_predictions=clean)
        {'attack_success_rate': 0.3333333333333333}
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info("Share of the correct samples that an attack turned into errors.", with_clean=True)

    def _compute(
        self, *, predictions: Sequence[int], references: Sequence[int], clean_predictions: Sequence[int]
    ) -> dict[str, float]:
        right = [c == y for c, y in zip(clean_predictions, references, strict=True)]
        turned = [a != y for a, y, known in zip(predictions, references, right, strict=True) if known]
        return {self.name: _share(turned) if _share(right) else math.nan}


def _info(description: str, with_clean: bool) -> evaluate.MetricInfo:
    names = ["predictions", "references", *["clean_predictions"] * with_clean]
    return evaluate.MetricInfo(
        description=description,
        citation="Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018",
        inputs_description=f"{', '.join(names)}: lists of class numbers. `predictions` are those under attack.",
        features=datasets.Features({name: datasets.Value("int32") for name in names}),
        reference_urls=["https://arxiv.org/abs/1706.06083"],
    )


def _share(values: Sequence[Any]) -> float:
    remedy = "Add predictions before compute()."
    require(len(values), "a share needs at least one sample", received="none", remedy=remedy, error=EvaluationError)
    return sum(values) / len(values)
