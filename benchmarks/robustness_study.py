"""Attack the trained models of a benchmark, every method alike: tables, a picture of accuracy over ε, all outcomes.

The models are those that `lenet5_mnist.py`, `vit_small.py` and `text_study.py` chose by accuracy on
clean validation data; attacks see the test split only, and all models the same samples of it. Each report is kept in
the output folder, and a second call goes on from there.

    python benchmarks/robustness_study.py --study lenet5 --record outputs/lenet5_mnist/results.json
    python benchmarks/robustness_study.py --study vit --record outputs/vit_mnist/results.json
    python benchmarks/robustness_study.py --study minilm --record outputs/text_study/results.json
"""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import load_dataset
from lenet5_parts import load_mnist
from record import digest, markdown, mean_and_spread, write_record
from robustness_models import Trained, lenet5, minilm, vit
from torch.utils.data import TensorDataset
from transformers import HfArgumentParser

from hf_condlr.robustness.attacks import FGSM, PGD, Attack, AutoAttack, CharacterAttack, Corruption, EmbeddingPGD
from hf_condlr.robustness.attacks.corruptions import KINDS
from hf_condlr.robustness.evaluation import RobustnessReport, evaluate_robustness, plot_reports

logger = logging.getLogger("robustness_study")


@dataclass
class Options:
    """What is attacked, and how."""

    study: str = field(metadata={"help": "Which models.", "choices": ["lenet5", "vit", "minilm"]})
    record: str = field(metadata={"help": "The JSON that the benchmark wrote beside the models."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Trainings to attack."})
    samples: int = field(default=1000, metadata={"help": "The first so many test images; test sentences drawn once."})
    steps: int = field(default=20, metadata={"help": "Of PGD, with one random start."})
    autoattack_seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of them: AutoAttack is slow."})
    autoattack_samples: int = field(default=500, metadata={"help": "The first so many test images for AutoAttack."})
    parts: list[str] = field(
        default_factory=lambda: ["attacks", "autoattack"], metadata={"help": "For two machines, or two cores."}
    )
    checked_seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Trainings that are checked too."})
    check_samples: int = field(default=128, metadata={"help": "Samples that the checks attack again."})
    threads: int = field(default=1, metadata={"help": "Of torch."})
    output_dir: str = field(default="outputs/robustness", metadata={"help": "Reports, tables and pictures go here."})


@dataclass(frozen=True)
class Part:
    """Attacks on some samples of a study's models, in one report."""

    name: str
    attacks: list[Attack]
    data: Any
    samples: int | None = None
    """Drawn from the data; all if None."""
    seeds: Sequence[int] = ()


@dataclass(frozen=True)
class Budgets:
    """From where all models still resist to where none does."""

    linf: tuple[float, ...]
    l2: tuple[float, ...]
    autoattack: float


IMAGES = {
    "lenet5": Budgets(linf=(0.02, 0.05, 0.1, 0.15, 0.2), l2=(0.5, 1.0, 1.5, 2.0), autoattack=0.1),
    "vit": Budgets(linf=(0.01, 0.03, 0.05, 0.07, 0.1), l2=(0.25, 0.5, 1.0, 1.5), autoattack=0.07),
}
EMBEDDING, CHARACTERS = (0.02, 0.05, 0.1), (0.1, 0.2)
SEVERITY = 3
MODELS: dict[str, Callable[[Path, Sequence[int]], Iterator[Trained]]] = {"lenet5": lenet5, "vit": vit, "minilm": minilm}


def image_parts(o: Options) -> list[Part]:
    """FGSM, PGD with cross entropy and with margin loss, corruptions; and AutoAttack on fewer images."""
    budgets, test = IMAGES[o.study], load_mnist(0)["test"]

    def first(count: int) -> TensorDataset:
        return TensorDataset(*test.batch(torch.arange(count)))

    attacks: list[Attack] = [FGSM(epsilon) for epsilon in budgets.linf]
    attacks += [PGD(e, "linf", steps=o.steps, loss=loss) for loss in ("ce", "margin") for e in budgets.linf]
    attacks += [PGD(epsilon, "l2", steps=o.steps) for epsilon in budgets.l2]
    attacks += [Corruption(kind, SEVERITY) for kind in KINDS]
    return [
        Part("attacks", attacks, first(o.samples), seeds=o.seeds),
        Part("autoattack", [AutoAttack(budgets.autoattack)], first(o.autoattack_samples), seeds=o.autoattack_seeds),
    ]


def text_parts(o: Options) -> list[Part]:
    """PGD on embeddings, and characters."""
    data = load_dataset(str(Path(os.environ.get("CONDLR_DATA", "../shared/data")) / "sst2"))["test"]
    attacks: list[Attack] = [EmbeddingPGD(epsilon, steps=o.steps) for epsilon in EMBEDDING]
    attacks += [CharacterAttack(share) for share in CHARACTERS]
    return [Part("attacks", attacks, data, o.samples, seeds=o.seeds)]


def evaluate(trained: Trained, part: Part, o: Options) -> RobustnessReport:
    """The report of one model, made once."""
    settings = {"model": str(trained.path), "attacks": [attack.settings() for attack in part.attacks]}
    key = settings | {"samples": part.samples or len(part.data)}
    folder = Path(o.output_dir) / o.study / "reports" / f"{trained.path.name}-{part.name}-{digest(key)}"
    if (folder / "report.json").exists():
        return RobustnessReport.load(folder / "report.json")
    report = evaluate_robustness(
        trained.build(),
        part.data,
        part.attacks,
        name=trained.method,
        max_samples=part.samples,
        checks=part.name == "attacks" and trained.seed in o.checked_seeds,  # AutoAttack is itself a check
        check_samples=o.check_samples,
        output_dir=folder,
        progress=False,
    )
    logger.info("seed %d\n%s", trained.seed, report)
    return report


# --------------------------------------------------------------------------------------------------------- tables


def accuracies(report: RobustnessReport) -> dict[str, dict[float, float]]:
    """{attack: {budget: accuracy}}; with the worst case of each threat that has several attacks."""
    found: dict[str, dict[float, float]] = {}
    for attack in report.attacks:
        found.setdefault(attack.name, {})[attack.epsilon] = attack.robust_accuracy
    for case in report.worst_cases:
        if len({attack.name for attack in report.attacks if attack.threat == case.threat}) > 1:
            found.setdefault(f"worst of all {case.threat}", {})[case.epsilon] = case.robust_accuracy
    return found


def attack_tables(reports: Sequence[RobustnessReport]) -> Iterator[str]:
    """For each attack with several budgets a line a method and a column a budget, over the seeds; then all others."""
    runs: dict[str, list[dict[str, dict[float, float]]]] = {}
    for report in reports:
        runs.setdefault(report.model, []).append({"clean": {0.0: report.clean_accuracy}} | accuracies(report))

    def cell(method: str, name: str, budget: float) -> str:
        return mean_and_spread([run[name][budget] for run in runs[method]], digits=1)

    rest = []
    for name, budgets in accuracies(reports[0]).items():
        if len(budgets) == 1:
            rest += [[name, f"{b:g}", *(cell(method, name, b) for method in runs)] for b in budgets]
            continue
        lines = [[m, cell(m, "clean", 0.0), *(cell(m, name, budget) for budget in budgets)] for m in runs]
        header = ["method", "clean", *(f"ε = {budget:g}" for budget in budgets)]
        yield f"{name}, accuracy in %\n\n{markdown(header, lines)}"
    if rest:
        rest.insert(0, ["clean", "", *(cell(method, "clean", 0.0) for method in runs)])
        yield "Accuracy in %\n\n" + markdown(["attack or corruption", "ε or severity", *runs], rest)


def area_table(reports: Sequence[RobustnessReport]) -> str:
    """Expected robustness: the area under the curve of the worst case over ε, over the seeds."""
    threats = [threat for threat in reports[0].threats if len(reports[0].curve(threat)[0]) > 2]
    lines = []
    for method in dict.fromkeys(report.model for report in reports):
        runs = [report for report in reports if report.model == method]
        lines.append([method, *(mean_and_spread([run.area(threat) for run in runs], 1) for threat in threats)])
    header = [f"{threat}, ε ≤ {reports[0].curve(threat)[0][-1]:g}" for threat in threats]
    return "Area under accuracy over ε, in %\n\n" + markdown(["method", *header], lines)


def facts_table(facts: Sequence[dict[str, Any]]) -> str:
    """What was attacked."""
    lines = []
    for method in dict.fromkeys(fact["method"] for fact in facts):
        runs = [fact for fact in facts if fact["method"] == method]
        kappa = statistics.mean(run["largest_kappa"] or float("inf") for run in runs)
        size = f"{runs[0]['parameters']:,}"
        lines.append([method, f"{runs[0]['learning_rate']:g}", size, f"{kappa:,.4g}", f"{len(runs)}"])
    return markdown(["method", "learning rate", "parameters", "largest κ, mean", "seeds"], lines)


def main() -> None:
    """Attack what has not been attacked, print the tables, write them, the record and the picture."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    o: Options = HfArgumentParser(Options).parse_args_into_dataclasses()[0]  # type: ignore[arg-type]
    torch.set_num_threads(o.threads)
    models = list(MODELS[o.study](Path(o.record), o.seeds))
    folder = Path(o.output_dir) / o.study
    facts = [trained.facts() for trained in models]
    results, tables = {}, [facts_table(facts)]
    for part in (text_parts if o.study == "minilm" else image_parts)(o):
        if part.name not in o.parts:
            continue
        attacked = [trained for trained in models if trained.seed in part.seeds]
        reports = [evaluate(trained, part, o) for trained in attacked]
        results[part.name] = [report.to_dict() for report in reports]
        tables += attack_tables(reports)
        if part.name == "attacks":
            tables += [area_table(reports)]
            plot_reports(reports, folder / "curves.png")  # runs of one method as one line
        pairs = zip(attacked, reports, strict=True)
        doubts = [f"- {t.method}, seed {t.seed}: {check}" for t, report in pairs for check in report.failed_checks]
        if doubts:
            tables.append("\n".join(["Failed checks", "", *doubts]))
    text = "\n\n".join(tables) + "\n"
    (folder / "tables.md").write_text(text)
    print(text)
    print(
        "wrote", write_record(folder / "results.json", {"models": facts, "reports": results}, o), folder / "curves.png"
    )


if __name__ == "__main__":
    main()
