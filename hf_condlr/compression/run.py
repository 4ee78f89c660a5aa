"""`Run`: the stages of `compress`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import PreTrainedModel

from hf_condlr.compression.arguments import CompressionArguments
from hf_condlr.compression.card import write_card
from hf_condlr.compression.data import Splits, data_digest, load_data, split
from hf_condlr.compression.measure import (
    forms,
    largest_condition_number,
    quality,
    require_finite,
    robustness,
)
from hf_condlr.compression.recovery import recover
from hf_condlr.compression.report import REPORT, CompressionReport, ModelMeasures
from hf_condlr.compression.search import Point, largest_ratio
from hf_condlr.compression.stages import Stages
from hf_condlr.compression.task import Task
from hf_condlr.compression.tasks import task_of
from hf_condlr.config import DATA_AWARE, CondLRConfig
from hf_condlr.conversion.convert import get_robust_lowrank_model
from hf_condlr.conversion.fold import fold_model
from hf_condlr.conversion.rank_budget import largest_compression
from hf_condlr.conversion.second_moments import Calibration
from hf_condlr.conversion.sequential import runs_in_blocks
from hf_condlr.conversion.targets import resolve_targets
from hf_condlr.layers import compressed_layers, condition_report, weight_matrix
from hf_condlr.options import finite_json, tau_as_json
from hf_condlr.robustness.attacks.base import Attack
from hf_condlr.robustness.evaluation.provenance import parameters_digest, versions
from hf_condlr.scripts.checks import check

logger = logging.getLogger(__name__)
ATTACK_SAMPLES = 128
FACTORED, RECOVERED, TRAINING = "factored", "recovered", "recovery"  # folders of the stages


class Run:
    """One call of `compress`: its settings, rows and stages."""

    def __init__(self, model: PreTrainedModel, data: Any, processor: Any, attacks: Any, args: CompressionArguments):
        accelerator = Accelerator()
        rule, received = "compress runs as one process", f"{accelerator.num_processes} processes"
        check(accelerator.num_processes == 1, rule, received, "Start it with python.")
        dense = not compressed_layers(model)
        remedy = "Give the dense model, or train this one further with CondLRTrainer."
        check(dense, "the model must be dense", "one that is compressed already", remedy)
        self.task = task_of(model, processor, args)
        _require_trainable(model, self.task, args)
        self.args = args = _with_robust_defaults(args, self.task)
        loaded, self.dataset_name = load_data(data, args.dataset_config)
        self.attacks = self._attacks(attacks)
        is_used = args.attack_samples is None or len(self.attacks) > 0
        check(is_used, "attack_samples is for attacks, of which there are none", args.attack_samples, "Leave it out.")
        self.config = self._config(args.ratio or 0.5)
        self.names = resolve_targets(model, self.config).names  # an error before anything is measured
        self.largest = self._largest_ratio(model)
        rule, remedy = f"ratio must leave rank 1 in every layer, here at most {self.largest:.4f}", "Lower it."
        check(args.ratio is None or args.ratio <= self.largest, rule, args.ratio, remedy)
        rows = self.task.columns(loaded)
        settings = (
            asdict(args)
            | {
                "tau": tau_as_json(self.config.tau),  # strict JSON has no infinity
                "model": parameters_digest(model)[:16],
                "data": data_digest(rows),
                "attacks": [attack.settings() for attack in self.attacks],
            }
        )
        del settings["output_dir"]  # it may be moved
        self.stages = Stages(args.output_dir, settings)
        self.splits: Splits = split(rows, choose_ratio=args.max_drop is not None, seed=args.seed)
        self.dense = copy.deepcopy(model).to(accelerator.device).eval()
        self.calibration: Calibration | None = None
        self.seconds: dict[str, float] = {}

    def finished(self) -> tuple[Any, CompressionReport] | None:
        """The result of a run that is complete; None if there is something to do."""
        folder = Path(self.args.output_dir)
        if not (folder / REPORT).is_file():
            return None
        logger.warning("%s is complete already", folder)
        return (type(self.dense).from_pretrained(folder), CompressionReport.load(folder))

    def compress(self) -> tuple[Any, CompressionReport]:
        """Run the stages that are not done."""
        before = self._stage("dense", self._measure_dense)
        ratio, found = self.args.ratio, None
        if ratio is None:
            found = self._stage("search", lambda: self._search(before["selection_quality"]))
            ratio = found["ratio"]
        ranks = self._stage(FACTORED, lambda: self._factor(ratio))["ranks"]
        model, unrecovered = self._load(FACTORED), None
        if self.args.recovery_steps:
            unrecovered = self._stage(RECOVERED, lambda: self._recover(model))["quality_before"]
            model = self._load(RECOVERED)
        after = self._stage("compressed", lambda: self._measure_compressed(model))
        self._warn_of_a_loss(unrecovered, after["quality"])
        report = self._report(ratio, ranks, before, after, found, unrecovered)
        return (self._save(model, report, after), report)

    def _stage(self, name: str, step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        result = self.stages.run(name, step)
        self.seconds[name] = result["seconds"]
        return result

    def _measure_dense(self) -> dict[str, Any]:
        value = quality(self.dense, self.task, self._evaluation(), f"{self.task.metric} of the dense model")
        require_finite(value, self.task, "dense")
        found = {"quality": value, "largest_kappa": largest_condition_number(self.dense, self.names)}
        if self.splits.selection is not None:
            found["selection_quality"] = quality(self.dense, self.task, self._selection(), "the same, to choose by")
            require_finite(found["selection_quality"], self.task, "dense")
        return finite_json(found | self._attacked(self.dense, "dense", checks=False))

    def _search(self, before: float) -> dict[str, Any]:
        seconds: list[float] = []

        def measured(name: str, ratio: float, tau: float) -> Point:
            def step() -> dict[str, Any]:
                candidate = self._converted(ratio, tau)
                value = quality(candidate, self.task, self._selection(), f"{self.task.metric} at ratio {ratio:g}")
                drop = self.task.drop(before, value)
                kappa = condition_report(candidate).max_condition_number
                return finite_json(asdict(Point(ratio, candidate.num_parameters(), value, drop, kappa)))

            point = self.stages.run(name, step)
            seconds.append(point.pop("seconds"))
            return Point(**point)

        assert self.args.max_drop is not None
        chosen, points = largest_ratio(
            lambda number, ratio: measured(f"search-{number}", ratio, self.config.tau),
            None if math.isinf(self.config.tau) else lambda ratio: measured("search-unbounded", ratio, math.inf),
            self.largest,
            self.args.max_drop,
            self.task.metric,
        )
        return {"ratio": chosen, "points": [asdict(point) for point in points], "seconds": round(sum(seconds), 2)}

    def _largest_ratio(self, model: Any) -> float:
        weights = {name: weight_matrix(model.get_submodule(name)) for name in self.names}
        shapes = {name: (W.shape[0], W.shape[1]) for name, W in weights.items()}
        return largest_compression(shapes, self.config.compression_form)

    def _converted(self, ratio: float, tau: float) -> Any:
        """A compressed copy of the dense model."""
        if self.config.needs_calibration_data and self.calibration is None:
            self.calibration = Calibration(self.task.calibration_data(self.splits.train))  # remembers, for all ratios
        config = dataclasses.replace(self._config(ratio, sequential_calibration=self._is_sequential), tau=tau)
        return get_robust_lowrank_model(copy.deepcopy(self.dense), config, calibration_data=self.calibration)

    def _config(self, ratio: float, **values: Any) -> CondLRConfig:
        """What the task takes where the arguments say nothing."""
        return self.args.condlr_config(ratio, tau=self.task.tau, rank_multiple=self.task.rank_multiple, **values)

    @functools.cached_property
    def _is_sequential(self) -> bool:
        """Whether the start is sequential where nobody said so."""
        can_be = self.config.init_weights in DATA_AWARE
        return can_be and self.calibration is not None and runs_in_blocks(self.dense, self.names, self.calibration.data)

    def _factor(self, ratio: float) -> dict[str, Any]:
        model = self._converted(ratio, self.config.tau)
        model.save_pretrained(self.stages.folder / FACTORED)
        return {"ranks": {layer.name: layer.r for layer in condition_report(model).layers}}

    def _recover(self, model: Any) -> dict[str, Any]:
        value = quality(model, self.task, self._evaluation(), f"{self.task.metric} before the recovery")
        recover(model, self.dense, self.task, self.splits.train, self.args, self.stages.folder / TRAINING)
        model.save_pretrained(self.stages.folder / RECOVERED)
        return finite_json({"steps": self.args.recovery_steps, "quality_before": value})

    def _warn_of_a_loss(self, unrecovered: float | None, recovered: float) -> None:
        """A learning rate that is too high spoils a good start; on adversarial samples a loss is to be expected."""
        if unrecovered is None or self.args.adversarial_epsilon is not None:
            return
        if self.task.drop(unrecovered, recovered) > 0:
            found = f"{self.task.metric} {unrecovered:.4g} before it, {recovered:.4g} after it"
            logger.warning("the recovery made the model worse: %s; lower learning_rate, or leave it out", found)

    def _measure_compressed(self, model: Any) -> dict[str, Any]:
        value = quality(model, self.task, self._evaluation(), f"{self.task.metric} of the compressed model")
        require_finite(value, self.task, "compressed")
        found: dict[str, Any] = {"quality": value, "largest_kappa": condition_report(model).max_condition_number}
        found |= self._attacked(model, "compressed", checks=True)
        return finite_json(found | forms(self.dense, model, self.task, self._evaluation()))

    def _attacked(self, model: Any, name: str, *, checks: bool) -> dict[str, Any]:
        folder, rows = self.stages.folder / f"attacks-{name}", self.splits.evaluation
        most = self.args.attack_samples or ATTACK_SAMPLES
        return robustness(model, self.task, rows, self.attacks, folder, most=most, checks=checks)

    def _report(
        self,
        ratio: float,
        ranks: dict[str, int],
        before: dict[str, Any],
        after: dict[str, Any],
        found: dict[str, Any] | None,
        unrecovered: float | None,
    ) -> CompressionReport:
        def form(name: str, measured: dict[str, Any]) -> ModelMeasures:
            kept: dict[str, Any] = {k: measured.get(k) for k in ("quality", "largest_kappa", "clean_of_attacked")}
            return ModelMeasures(**after[name], **kept, robust=measured.get("robust", {}))

        device = next(self.dense.parameters()).device
        data: dict[str, Any] = {
            "dataset": self.dataset_name,
            "evaluation": self.splits.evaluation_name,
            "evaluation_rows": len(self._evaluation()),
            "attacked": after.get("attacked", 0),
            "calibration_rows": min(self.task.calibration_samples, len(self.splits.train)),
            "sample": after["sample"],
            "device": str(device),
            "threads": torch.get_num_threads(),
        }
        if found is not None:
            data |= {"selection": self.splits.selection_name, "selection_rows": len(self._selection())}
            data["selection_quality"] = before["selection_quality"]
        return CompressionReport(
            metric=self.task.metric,
            ratio=ratio,
            tau=self.config.tau,
            form=self.args.form,
            dense=form("dense", before),
            factored=form("factored", after),
            folded=ModelMeasures(**after["folded"]),
            pivoted=ModelMeasures(**after["pivoted"]),
            ranks=ranks,
            seconds=self.seconds,
            data=data,
            curve=[Point(**point) for point in found["points"]] if found is not None else [],
            max_drop=self.args.max_drop,
            recovery_steps=self.args.recovery_steps,
            quality_before_recovery=unrecovered,
            failed_checks=after.get("failed_checks", []),
            versions=versions(),
        )

    def _save(self, model: Any, report: CompressionReport, after: dict[str, Any]) -> Any:
        """Write the model, its processor, the card and the report, which says that the run is complete."""
        folder = Path(self.args.output_dir)
        form: Any = self.args.form
        saved = model if form == "factored" else fold_model(copy.deepcopy(model), form)
        saved.save_pretrained(folder)
        with suppress(AttributeError):  # a processor of one's own
            self.task.processor.save_pretrained(folder)
        write_card(saved, folder, report, after.get("card_entries", []))
        report.save(folder)
        self.stages.remove(FACTORED, RECOVERED, TRAINING)
        return saved

    def _load(self, name: str) -> Any:
        folder = self.stages.folder / name
        return type(self.dense).from_pretrained(folder, dtype=self.dense.dtype).to(self.dense.device).eval()

    def _evaluation(self) -> Dataset:
        return self.task.inputs(self.splits.evaluation, self.args.max_eval_samples)

    def _selection(self) -> Dataset:
        assert self.splits.selection is not None
        return self.task.inputs(self.splits.selection, self.args.max_eval_samples)

    def _attacks(self, attacks: Any) -> list[Attack]:
        if attacks is None:
            found, radius = self.task.attacks(), self.args.adversarial_epsilon
            if self.args.robust and radius != found[-1].epsilon:  # also where it trains
                found.append(dataclasses.replace(found[-1], epsilon=radius))  # type: ignore[type-var]
            return found
        chosen: list[Attack] = [attacks] if isinstance(attacks, Attack) else list(attacks)
        rule, remedy = f"{self.task.metric} of this model is not attacked", "Leave the attacks out."
        check(not chosen or self.task.kind is not None, rule, ", ".join(a.name for a in chosen), remedy)
        return chosen


def _with_robust_defaults(args: CompressionArguments, task: Task) -> CompressionArguments:
    """The arguments with the task's radius and learning rate of a robust recovery, where none are given."""
    if not args.robust:
        return args
    epsilon = task.robust_epsilon if args.adversarial_epsilon is None else args.adversarial_epsilon
    rate = args.learning_rate or task.robust_learning_rate
    return dataclasses.replace(args, adversarial_epsilon=epsilon, learning_rate=rate)


def _require_trainable(model: PreTrainedModel, task: Task, args: CompressionArguments) -> None:
    """Refuse, before anything is measured, a recovery that would be refused after it."""
    given = {"robust": args.robust or None, "adversarial_epsilon": args.adversarial_epsilon}
    named = [f"{name}={value}" for name, value in given.items() if value is not None]
    rule, remedy = "only classifiers of images and texts recover on adversarial samples", "Leave that out."
    check(not named or task.kind is not None, rule, ", ".join(named), remedy)
    rule, remedy = "a recovery trains factors in float32", "Load the model with dtype=torch.float32."
    check(not args.recovery_steps or model.dtype in (torch.float32, torch.float64), rule, model.dtype, remedy)
