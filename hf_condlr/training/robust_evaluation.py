"""Robust accuracy in a Trainer's evaluations: logged, a metric for the best model, and part of the model card."""

from __future__ import annotations

import re
from typing import Any

from hf_condlr.robustness.evaluation import evaluate_robustness
from hf_condlr.robustness.evaluation.samples import Samples
from hf_condlr.training.arguments import RobustnessArguments

# What an evaluation logs besides its metrics: speed, and what the card takes from the model itself.
_NOT_MEASURED = re.compile(r"runtime|_per_second$|^kappa_|^orthonormality_error$|^compression$|_preparation_time$")


def check_evaluation_data(trainer: Any) -> None:
    """Refuse evaluation data that cannot be attacked, before the training.

    Raises:
        EvaluationError: They are of no kind that can be attacked, or images whose normalisation no `processing_class`
            tells.
    """
    given = trainer.eval_dataset
    for dataset in given.values() if isinstance(given, dict) else [given]:
        if dataset is not None:
            Samples(trainer.accelerator.unwrap_model(trainer.model), dataset, processor=trainer.processing_class)


def robust_metrics(trainer: Any, dataset: Any, robustness: RobustnessArguments) -> dict[str, float]:
    """Attack a part of a data set.

    Returns:
        `robust_accuracy`, every sample's worst case over all attacks; `accuracy_pgd_linf_0.0313725` and the like, under
        one attack; `robust_samples`, how many samples were attacked.
    """
    report = evaluate_robustness(
        trainer.accelerator.unwrap_model(trainer.model),
        dataset,
        attacks=robustness.build(),
        processor=trainer.processing_class,
        data_collator=trainer.data_collator,
        accelerator=trainer.accelerator,
        max_samples=robustness.max_samples,
        batch_size=robustness.batch_size or trainer.args.eval_batch_size,
        checks=False,
        progress=False,
    )
    attacked = {_key(result): result.robust_accuracy for result in report.attacks}
    return {"robust_accuracy": report.robust_accuracy, **attacked, "robust_samples": report.samples}


def last_evaluation(trainer: Any) -> dict[str, Any]:
    """The last evaluation of the model as it is: after the training, or of the best model where that was loaded."""
    history, state = trainer.state.log_history, trainer.state
    ended = max((i for i, entry in enumerate(history) if "train_runtime" in entry), default=-1)
    after, during = history[ended + 1 :], history[: ended + 1]
    if trainer.args.load_best_model_at_end and state.best_global_step:
        during = [entry for entry in during if entry.get("step") == state.best_global_step]
    for entry in reversed([*during, *after]):
        found = {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
        if found:
            return found
    return {}


def card_metrics(evaluation: dict[str, Any], robustness: RobustnessArguments | None) -> dict[str, Any]:
    """The metrics of an evaluation for the model card, without those of attacks, which have their own entries."""
    attacks = robustness.build() if robustness is not None else []
    hidden = {"robust_accuracy", "robust_samples", *map(_key, attacks)} if attacks else set()
    return {k: value for k, value in evaluation.items() if k not in hidden and not _NOT_MEASURED.search(k)}


def card_attacks(evaluation: dict[str, Any], robustness: RobustnessArguments | None) -> list[dict[str, Any]]:
    """The attacks of an evaluation for the model card."""
    return [
        {"attack": attack.name, "epsilon": attack.epsilon}
        | {name: getattr(attack, name) for name in ("steps", "restarts") if hasattr(attack, name)}
        | {"samples": evaluation["robust_samples"], "accuracy": evaluation[_key(attack)]}
        for attack in (robustness.build() if robustness is not None else ())
        if _key(attack) in evaluation
    ]


def _key(attack: Any) -> str:
    """Name of the metric under an attack, `Attack` or `AttackResult`."""
    return f"accuracy_{attack.name.replace('-', '_')}_{attack.epsilon:g}"
