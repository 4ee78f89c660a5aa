r"""Attack the trained models of a study, every method alike: tables, a picture of accuracy over ε, all outcomes.

The models are those that `studies.paper.table`, `studies.vit_small` and `studies.text_study` chose by accuracy on clean
validation data; attacks see the test split only, and all models the same samples of it. Each report is kept beside its
model, and a second call goes on from there.

    CONDLR_DATA=path/to/data python -m studies.robustness_study --study lenet5 \
        --record outputs/constant/results.json
    CONDLR_DATA=path/to/data python -m studies.robustness_study --study vit --record outputs/vit_mnist/results.json
    CONDLR_DATA=path/to/data python -m studies.robustness_study --study minilm --record outputs/text_study/results.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import load_dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_condlr import RobustnessReport
from hf_condlr.options import option
from hf_condlr.robustness.attacks import (
    FGSM,
    PGD,
    Attack,
    AutoAttack,
    CharacterAttack,
    Corruption,
    EmbeddingPGD,
    TextModel,
)
from hf_condlr.robustness.attacks.corruptions import KINDS
from hf_condlr.robustness.evaluation.report import plot_reports
from hf_condlr.tables import markdown_table
from studies import vit_small
from studies.data import data_folder, load_images, pixel_model
from studies.paper.study import load_trained
from studies.record import mean_and_spread, parse, set_up, write_record
from studies.report import summary_table
from studies.rows import attacked
from studies.text_training import MAX_LENGTH


@dataclass
class Options:
    """What is attacked, and how."""

    study: str = field(metadata={"help": "Which models.", "choices": ["lenet5", "vit", "minilm"]})
    record: str = field(metadata={"help": "results.json of the study that trained the models."})
    samples: int = option(1000, "Number of test images, the first ones, or of test sentences, drawn once.")
    steps: int = option(20, "Steps of PGD, with one random start.")
    autoattack_samples: int = option(500, "Number of test images for AutoAttack, the first ones; first seed only.")
    checked_seeds: list[int] = option([0], "Trainings that are checked too.")
    check_samples: int = option(128, "Samples that the checks attack again.")
    threads: int = option(1, "Threads of torch.")
    output_dir: str = option("outputs/robustness", "Tables and pictures go to STUDY in it.")


@dataclass(frozen=True)
class Part:
    """Attacks on some samples of a study's models, in one report; only for the first seed if `once`."""

    attacks: list[Attack]
    data: Callable[[], Any]
    samples: int
    once: bool = False


# From budgets that all models resist to budgets that none does: ℓ∞, ℓ2, and the one of AutoAttack.
BUDGETS = {
    "lenet5": ((0.02, 0.05, 0.1, 0.15, 0.2), (0.5, 1.0, 1.5, 2.0), 0.1),
    "vit": ((0.01, 0.03, 0.05, 0.07, 0.1), (0.25, 0.5, 1.0, 1.5), 0.07),
}
EMBEDDING, CHARACTERS = (0.02, 0.05, 0.1), (0.1, 0.2)
SEVERITY = 3


def parts(o: Options) -> list[Part]:
    """FGSM, PGD with two losses, corruptions and AutoAttack on images; embeddings and characters on texts."""
    if o.study == "minilm":
        attacks: list[Attack] = [EmbeddingPGD(epsilon, steps=o.steps) for epsilon in EMBEDDING]
        attacks += [CharacterAttack(share) for share in CHARACTERS]
        return [Part(attacks, lambda: load_dataset(data_folder("sst2"))["test"], o.samples)]
    test = load_images()["test"]
    linf, l2, autoattack = BUDGETS[o.study]
    attacks = [FGSM(epsilon) for epsilon in linf]
    attacks += [PGD(epsilon, "linf", steps=o.steps, loss=loss) for loss in ("ce", "margin") for epsilon in linf]
    attacks += [PGD(epsilon, "l2", steps=o.steps) for epsilon in l2]
    attacks += [Corruption(kind, SEVERITY) for kind in KINDS]
    few = Part([AutoAttack(autoattack)], partial(test.first, o.autoattack_samples), o.autoattack_samples, once=True)
    return [Part(attacks, partial(test.first, o.samples), o.samples), few]


def build(study: str, row: dict[str, Any]) -> nn.Module:
    """The trained model of a row, with what lies between pixels or text and its inputs."""
    if study == "lenet5":
        return pixel_model(load_trained(row)).eval()
    if study == "vit":
        return vit_small.load_trained(row["folder"])
    model = AutoModelForSequenceClassification.from_pretrained(row["folder"]).eval()
    return TextModel(model, AutoTokenizer.from_pretrained(row["folder"]), max_length=MAX_LENGTH)


# --------------------------------------------------------------------------------------------------------- tables


def table(tests: Sequence[dict[str, Any]], reports: Sequence[RobustnessReport]) -> str:
    """A line for each attack and budget, a column for each method, over the seeds; the area under accuracy over ε."""
    lines: dict[str, dict[str, list[float]]] = {}
    for test, report in zip(tests, reports, strict=True):
        areas = {
            f"area, {threat}": report.area(threat) for threat in report.threats if len(report.curve(threat)[0]) > 2
        }
        for name, value in ({"clean": report.clean_accuracy} | test["robust_accuracy"] | areas).items():
            lines.setdefault(name, {}).setdefault(test["label"], []).append(value)
    cells = [[name, *map(mean_and_spread, methods.values())] for name, methods in lines.items()]
    return "Accuracy in %\n\n" + markdown_table(["attack", *lines["clean"]], cells, align="lr")


def main() -> None:
    """Attack what has not been attacked, print the tables, write them, the record and the picture."""
    (o,) = parse(Options)
    set_up(o.threads)
    rows = [row for row in json.loads(Path(o.record).read_text())["rows"] if not row["diverged"]]
    folder = Path(o.output_dir) / o.study
    folder.mkdir(parents=True, exist_ok=True)
    results, tables = [], [summary_table(rows)]
    for part in parts(o):
        tests = [
            attacked(
                Path(row["folder"]),
                row["label"],
                part.attacks,
                part.samples,
                build=partial(build, o.study, row),
                data=part.data,
                checks=not part.once and row["seed"] in o.checked_seeds,  # AutoAttack is itself a check
                check_samples=o.check_samples,
            )
            | {"label": row["label"], "seed": row["seed"]}
            for row in rows
            if not part.once or row["seed"] == rows[0]["seed"]
        ]
        results.append(tests)
        reports = [RobustnessReport.load(test["report"]) for test in tests]
        tables.append(table(tests, reports))
        if not part.once:
            plot_reports(reports, folder / "curves.png")  # runs of one method as one line
        doubts = [f"- {x['label']}, seed {x['seed']}: {check}" for x in tests for check in x["failed_checks"]]
        if doubts:
            tables.append("\n".join(["Failed checks", "", *doubts]))
    text = "\n\n".join(tables) + "\n"
    (folder / "tables.md").write_text(text, encoding="utf-8")
    path = write_record(folder / "results.json", {"models": rows, "tests": results}, o)
    print(f"{text}\nwrote {path} {folder / 'tables.md'} {folder / 'curves.png'}")


if __name__ == "__main__":
    main()
