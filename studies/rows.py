"""Finished rows of a study are kept: a second call with the same settings goes on where the first one ended."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_condlr import evaluate_robustness
from hf_condlr.robustness.attacks import Attack
from studies.record import logger, write_json

CHECKPOINT = "checkpoint.pt"
"""State of a training that is not finished; removed when its row is."""


class Rows:
    """A folder for each row, found again by the row's settings."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, name: str, key: Mapping[str, Any]) -> Path:
        """`name` in letters and digits, and a digest of `key`, which holds every setting that the row depends on."""
        return self.root / f"{re.sub(r'[^a-z0-9_.=]+', '-', name.lower())}-{digest(key)}"

    def row(self, name: str, key: Mapping[str, Any], make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The row of these settings: `key`, the results of `make`, which may keep files in `folder`, and `folder`."""
        folder = self.folder(name, key)
        if not (folder / "row.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            results = make(folder)
            write_json(folder / "row.json", {"key": key, **results})
            (folder / CHECKPOINT).unlink(missing_ok=True)
            accuracy = results.get("validation_accuracy", results.get("clean_accuracy"))
            logger.info("%s: accuracy %s", name, accuracy)
        return {**json.loads((folder / "row.json").read_text()), "folder": str(folder)}


def digest(settings: Any) -> str:
    """A short digest of settings, for the name of a folder."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]


def attacked(
    folder: Path,
    label: str,
    attacks: Sequence[Attack],
    samples: int | None,
    *,
    build: Callable[[], nn.Module],
    data: Callable[[], Any],
    clean: Callable[[Any], float] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What the test adds to a row; measured once and kept in the row's folder, with the report of the attacks.

    Args:
        folder: Of the row.
        label: Name of the model in the report.
        attacks: Attacks on the test samples.
        samples: How many of the samples of `data`, drawn once, the same for all models; None: all.
        build: Makes the model.
        data: Makes the test samples.
        clean: Accuracy without attack; by default that of the attacked samples.
        options: Of `evaluate_robustness`.
    """

    def make(place: Path) -> dict[str, Any]:
        model = build()
        report = evaluate_robustness(
            model, data(), list(attacks), name=label, max_samples=samples, output_dir=place, progress=False, **options
        )
        logger.info("%s", report)
        robust = {f"{attack.name} {attack.epsilon:g}": attack.robust_accuracy for attack in report.attacks}
        robust |= {f"worst {case.threat} {case.epsilon:g}": case.robust_accuracy for case in report.worst_cases}
        return {
            "clean_accuracy": clean(model) if clean else report.clean_accuracy,
            "clean_on_attacked": report.clean_accuracy,
            "robust_accuracy": robust,
            "failed_checks": [str(check) for check in report.failed_checks],
            "report": str(place / "report.json"),
        }

    key = {"attacks": [attack.settings() for attack in attacks], "samples": samples}
    return Rows(folder).row("test", key, make)


def sweep(
    variants: Iterable[Any],
    rates: Iterable[float],
    seeds: Sequence[int],
    *,
    train: Callable[[Any, float, int], dict[str, Any]],
    test: Callable[[Any, float, int], dict[str, Any]],
    write: Callable[[dict[str, Any]], Any] = lambda results: None,
) -> dict[str, Any]:
    """The rows of a study, every method under the same rules.

    Each variant trains at every rate with the first seed. The validation accuracy chooses, the smaller one of two equal
    rates; the other seeds train at the choice only. The test split, clean and attacked, is used after that, once for
    each chosen model.

    Args:
        variants: What is compared; passed to `train` and `test`.
        rates: Learning rates.
        seeds: The first one sweeps.
        train: The row of (variant, rate, seed), with `label`, `learning_rate`, `diverged` and `validation_accuracy`.
        test: What the test adds to that row.
        write: Called with the results so far after each choice and each test.

    Returns:
        `sweep`, all rows of the first seed; `chosen`, label and rate of each variant, None where all diverged; `rows`.
    """
    results: dict[str, Any] = {"sweep": [], "chosen": [], "rows": []}
    choices: list[tuple[Any, float]] = []
    for variant in variants:
        found = [train(variant, rate, seeds[0]) for rate in sorted(rates)]
        sound = [row for row in found if not row["diverged"]]
        best = max(sound, key=lambda row: row["validation_accuracy"])["learning_rate"] if sound else None
        results["sweep"] += found
        results["chosen"].append({"label": found[0]["label"], "learning_rate": best})
        choices += [] if best is None else [(variant, best)]
        write(results)
    for seed in seeds:
        for variant, rate in choices:
            row = train(variant, rate, seed)
            results["rows"].append(row if row["diverged"] else test(variant, rate, seed) | row)
            write(results)
    return results
