"""Robust accuracy and attack success rate as metrics of `evaluate`: without a network, in one process or several.

Predictions are class numbers. `num_process`, `process_id` and `experiment_id` are those of `evaluate.Metric`: each
process adds its own samples, and process 0 gets the result over all of them from `compute`, the others None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate

from hf_condlr.errors import EvaluationError

CITATION = """\
@inproceedings{madry2018towards,
  title={Towards Deep Learning Models Resistant to Adversarial Attacks},
  author={Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, Adrian},
  booktitle={International Conference on Learning Representations},
  year={2018}
}
"""


INPUTS = """
Args:
    predictions (`list` of `int`): Predicted classes under attack.
    references (`list` of `int`): True classes.
"""


CLEAN = "    clean_predictions (`list` of `int`): Predicted classes of the same samples without the attack.\n"


class RobustAccuracy(evaluate.Metric):
    """Share of the samples that are classified correctly under an attack.

    The adversary may also leave a sample as it is, so an attack never mends an error: what is misclassified without
    the attack is not robust, whatever the attack made of it. Attacks that keep each sample's worst iterate see to that
    themselves. For others, FGSM among them, `RobustAccuracy("with_clean")` takes `clean_predictions` too, and a sample
    counts only where both predictions are right.

    Args:
        config_name: None for predictions under attack and references; `with_clean` for the clean predictions as well.
        options: Those of `evaluate.Metric`.

    Example:
        >>> RobustAccuracy().compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
        {'robust_accuracy': 0.75}
        >>> attacked, clean, labels = [0, 1, 1, 0], [0, 1, 0, 2], [0, 1, 0, 0]
        >>> RobustAccuracy("with_clean").compute(
        ...     predictions=attacked, references=labels, clean_predictions=clean
        ... )
        {'robust_accuracy': 0.5}
    """

    def __init__(self, config_name: str | None = None, **options: Any) -> None:
        if config_name not in (None, "default", "with_clean"):
            raise EvaluationError(
                "config_name of RobustAccuracy must be None or 'with_clean'",
                received=repr(config_name),
                remedy="RobustAccuracy('with_clean') takes clean_predictions, RobustAccuracy() does not.",
            )
        super().__init__(config_name, **options)

    def _info(self) -> evaluate.MetricInfo:
        with_clean = self.config_name == "with_clean"
        return _info(
            "Share of the samples that are classified correctly under an attack"
            + (" and without it." if with_clean else "."),
            "Returns:\n    robust_accuracy (`float`): Between 0.0 and 1.0.\n",
            with_clean,
        )

    def _compute(
        self, *, predictions: Sequence[int], references: Sequence[int], clean_predictions: Sequence[int] | None = None
    ) -> dict[str, float]:
        if clean_predictions is None:
            clean_predictions = references
        elif self.config_name != "with_clean":  # evaluate hands on what is no feature, and only from process 0
            raise EvaluationError(
                "RobustAccuracy() takes predictions under attack and references",
                received="clean_predictions as well",
                remedy="Use RobustAccuracy('with_clean'): a sample then counts where both predictions are right.",
            )
        robust = [a == c == y for a, c, y in zip(predictions, clean_predictions, references, strict=True)]
        return {self.name: _share(robust)}


class AttackSuccessRate(evaluate.Metric):
    """Share of the samples classified correctly without an attack that the attack turned into errors.

    It is 1 − `RobustAccuracy("with_clean")`/clean accuracy; nan where no sample was classified correctly to begin with.

    Example:
        >>> attacked, clean, labels = [0, 1, 1, 0], [0, 1, 0, 2], [0, 1, 0, 0]
        >>> AttackSuccessRate().compute(predictions=attacked, references=labels, clean_predictions=clean)
        {'attack_success_rate': 0.3333333333333333}
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            "Share of the samples classified correctly without an attack that the attack turned into errors.",
            "Returns:\n    attack_success_rate (`float`): Between 0.0 and 1.0; nan where none was right before.\n",
            with_clean=True,
        )

    def _compute(
        self, *, predictions: Sequence[int], references: Sequence[int], clean_predictions: Sequence[int]
    ) -> dict[str, float]:
        right = [c == y for c, y in zip(clean_predictions, references, strict=True)]
        turned = [a != y for a, y, known in zip(predictions, references, right, strict=True) if known]
        return {self.name: _share(turned) if _share(right) else math.nan}


def _info(description: str, returns: str, with_clean: bool) -> evaluate.MetricInfo:
    names = ["predictions", "references", *["clean_predictions"] * with_clean]
    return evaluate.MetricInfo(
        description=description,
        citation=CITATION,
        inputs_description=INPUTS + (CLEAN if with_clean else "") + "\n" + returns,
        features=datasets.Features({name: datasets.Value("int32") for name in names}),
        reference_urls=["https://arxiv.org/abs/1706.06083"],
    )


def _share(values: Sequence[Any]) -> float:
    if not len(values):
        raise EvaluationError(
            "a share needs at least one sample", received="none", remedy="Add predictions before compute()."
        )
    return sum(values) / len(values)
