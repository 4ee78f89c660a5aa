"""Robust accuracy in the Trainer's evaluations: logged, a metric for the best model, and part of the model card."""

from __future__ import annotations

from typing import Any

from transformers.trainer_utils import EvalLoopOutput

from hf_condlr.layers import factored_layers
from hf_condlr.robustness.evaluation import evaluate_robustness
from hf_condlr.robustness.evaluation.samples import Samples
from hf_condlr.training.arguments import RobustnessArguments
from hf_condlr.training.factored import FactoredTrainerMixin


class RobustEvaluationMixin(FactoredTrainerMixin):
    """Attacks a part of the data set at the end of each `evaluate()`. To be put before a Trainer class.

    Metrics, behind the evaluation's prefix: `robust_accuracy`, every sample's worst case over all attacks;
    `accuracy_pgd_linf_0.0313725` and the like, under one attack; `robust_samples`, how many were attacked. `predict()`
    attacks nothing.

    Args:
        robustness: The attacks; none without it.

    Raises:
        EvaluationError: The evaluation data are none that can be attacked, or images whose normalisation no
            `processing_class` tells.
    """

    eval_dataset: Any
    processing_class: Any
    data_collator: Any

    def __init__(self, *args: Any, robustness: RobustnessArguments | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.robustness = robustness
        given: Any = self.eval_dataset if robustness is not None else None
        for dataset in given.values() if isinstance(given, dict) else [given]:
            if dataset is not None:  # what is wrong with it is said now, not after an epoch
                Samples(self.accelerator.unwrap_model(self.model), dataset, processor=self.processing_class)

    def evaluation_loop(
        self, dataloader: Any, description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Trainer's; that of an evaluation ends with the attacks."""
        loop = super().evaluation_loop  # type: ignore[misc]
        output = loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.robustness is not None and description == "Evaluation":  # predict() says "Prediction"
            measured = self._attack(dataloader.dataset, self.robustness)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in measured.items()})
        return output

    def _attack(self, dataset: Any, robustness: RobustnessArguments) -> dict[str, float]:
        report = evaluate_robustness(
            self.accelerator.unwrap_model(self.model),
            dataset,
            attacks=robustness.build(),
            processor=self.processing_class,
            data_collator=self.data_collator,
            accelerator=self.accelerator,
            max_samples=robustness.max_samples,
            batch_size=robustness.batch_size or self.args.eval_batch_size,
            checks=False,
            progress=False,
        )
        attacked = {_key(result): result.robust_accuracy for result in report.attacks}
        return {"robust_accuracy": report.robust_accuracy, **attacked, "robust_samples": report.samples}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As `FactoredTrainerMixin.create_model_card`, with the attacks of the last evaluation where none are given."""
        if self.robustness is not None and factored_layers(self.accelerator.unwrap_model(self.model)):
            kwargs.setdefault("robustness", self._card_entries(self.robustness))
        super().create_model_card(*args, **kwargs)

    def _card_entries(self, robustness: RobustnessArguments) -> list[dict[str, Any]]:
        """Of the evaluation that the card's metrics are from."""
        measured = self._last_evaluation()
        return [
            {"attack": attack.name, "epsilon": attack.epsilon}
            | {name: getattr(attack, name) for name in ("steps", "restarts") if hasattr(attack, name)}
            | {"samples": measured["robust_samples"], "accuracy": measured[_key(attack)]}
            for attack in robustness.build()
            if _key(attack) in measured
        ]

    def _metrics(self) -> dict[str, Any]:
        """Without what the card says of attacks."""
        attacks = self.robustness.build() if self.robustness is not None else []
        hidden = {"robust_accuracy", "robust_samples", *map(_key, attacks)} if attacks else set()
        return {name: value for name, value in super()._metrics().items() if name not in hidden}


def _key(attack: Any) -> str:
    """Name of the metric under an attack, `Attack` or `AttackResult`."""
    return f"accuracy_{attack.name.replace('-', '_')}_{attack.epsilon:g}"
