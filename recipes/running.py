"""What every training recipe does with its Trainer: train, evaluate, attack, save, describe and push."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from command_line import require
from labelled_data import LabelledDataArguments
from restart import steps_done
from transformers import EvalPrediction, Trainer

from hf_condlr import CondLRTrainingArguments, RobustnessReport, condition_report, evaluate_robustness, is_factored
from hf_condlr.files import replacing

logger = logging.getLogger(__name__)
ATTACKING = ("attacks", "epsilons", "attack_steps", "max_attack_samples", "attack_checks")
AFTERWARDS = (*ATTACKING, "prompt", "max_new_tokens")  # trains no other model


def settings(model_args: Any, data_args: Any, training_args: CondLRTrainingArguments) -> dict[str, Any]:
    """What a training depends on beside the Trainer's own options."""
    data = {name: value for name, value in vars(data_args).items() if name not in AFTERWARDS}
    return vars(model_args) | data | {"processes": training_args.world_size}


def prepare(args: CondLRTrainingArguments) -> None:
    """The Trainer's arguments, for this machine."""
    args.dataloader_pin_memory &= torch.accelerator.is_available()  # else torch warns at each loader


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Of the class with the largest logit."""
    scores = prediction.predictions  # (N, classes); BART and T5 give hidden states after it
    scores = scores[0] if isinstance(scores, tuple) else scores
    return {"accuracy": float((scores.argmax(-1) == prediction.label_ids).mean())}


def require_whole_for_attacks(trainer: Trainer, data_args: LabelledDataArguments) -> None:
    """Refuse attacks on a model whose parameters FSDP shards: they ask a process for gradients on its own.

    Raises:
        ValueError: It is sharded, and attacks in training or at the end are asked for.
    """
    asked = {"epsilons": data_args.epsilons, "adversarial_attack": getattr(trainer.args, "adversarial_attack", "none")}
    asked = {name: value for name, value in asked.items() if value not in ([], "none")}
    rule, remedy = (
        "attacks need the whole model on every process",
        "Leave them out, attack the saved model, or use DDP.",
    )
    require(not asked or not trainer.is_fsdp_enabled, f"{rule}, which FSDP shards", asked, remedy)


def train(trainer: Trainer, checkpoint: str | None) -> None:
    """From the checkpoint to the end; metrics and state are written."""
    if trainer.is_world_process_zero() and is_factored(trainer.model) and trainer.model.condlr.report:
        print(trainer.model.condlr.report)
    output = trainer.train(resume_from_checkpoint=checkpoint)
    done = steps_done(checkpoint)
    if trainer.state.global_step > done:  # else all was trained, and its metrics lie there
        # Where training went on, its loss and time are those of the rest.
        trainer.save_metrics("train", output.metrics | {"train_steps_before": done})
    trainer.save_state()


def attack(
    trainer: Trainer, model: Any, rows: Any, args: LabelledDataArguments, split: str
) -> tuple[dict[str, float], RobustnessReport | None]:
    """Accuracy under each attack, and the report; nothing where no epsilon is given. Finished batches are kept.

    Args:
        trainer: With the model's image processor or tokenizer.
        model: Its model, or that as attacks are to see it.
        rows: Images or texts, as `evaluate_robustness` takes them.
        args: The attacks.
        split: What the rows are called.
    """
    attacks = args.make_attacks()
    if not attacks:
        return {}, None
    report = evaluate_robustness(
        model,
        rows,
        attacks,
        processor=trainer.processing_class,
        accelerator=trainer.accelerator,
        batch_size=trainer.args.eval_batch_size,
        checks=args.attack_checks,
        max_samples=args.max_attack_samples,
        output_dir=Path(trainer.args.output_dir) / "attacks",
        progress=not trainer.args.disable_tqdm,
    )
    metrics = {f"{split}_accuracy_{r.name.replace('-', '_')}_{r.epsilon:g}": r.robust_accuracy for r in report.attacks}
    metrics |= {f"{split}_robust_accuracy": report.robust_accuracy, f"{split}_attacked_samples": report.samples}
    return metrics, report


def finish(
    trainer: Trainer,
    split: str,
    metrics: Mapping[str, float],
    *,
    dataset: str | None = None,
    report: RobustnessReport | None = None,
    further: Callable[[], None] = lambda: None,
) -> None:
    """Write metrics, model and model card, and push them if that is asked for.

    Args:
        trainer: After training.
        split: That was evaluated last.
        metrics: Of it.
        dataset: Name of the data on the Hub.
        report: Of the attacks.
        further: Writes what else belongs in the folder, on every process, once the model is safe.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)
    card: dict[str, Any] = {"dataset": dataset}
    save(trainer, folder)
    further()
    if report is not None and trainer.is_world_process_zero():
        print(report)
        report.save(folder / "robustness.json")
    if report is not None and is_factored(trainer.model):
        card["robustness"] = report.card_entries()
    if args.push_to_hub:
        trainer.push_to_hub(**card)
    else:
        trainer.create_model_card(**card)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def save(trainer: Trainer, folder: Path) -> None:
    """The model, its image processor or tokenizer, and what became of the condition numbers.

    Every process must call it, for all of them measure and gather a sharded model; the first one writes.
    """
    model, first = trainer.accelerator.unwrap_model(trainer.model), trainer.is_world_process_zero()
    factored = is_factored(model)
    if factored:
        report = condition_report(model)
        if first:
            with replacing(folder / "condition_report.json") as temporary:
                temporary.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    gathered = {}
    if trainer.is_fsdp_enabled and not factored:  # the library gathers factored models itself
        gathered = {"state_dict": trainer.accelerator.get_state_dict(trainer.model)}
    model.save_pretrained(folder, is_main_process=first, **gathered)  # factors alone; `import hf_condlr` loads them
    if first:
        trainer.processing_class.save_pretrained(folder)
