"""The published experiment of CondLR on MNIST (arXiv 2306.01485), all methods alike: one command makes the table.

    python -m studies.paper.table --data_dir path/to/data

LeNet5, SGD, batches of 128, learning rate times 0.3 after 70 and 100 of 120 epochs; with fewer epochs the two places
move proportionally. The rules are those of `studies.rows.sweep`. Rows that are finished are kept, and a row that was
killed goes on after its last epoch: give the same command again. Other methods, rates or seeds add to what is there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_condlr.files import replacing
from hf_condlr.options import option
from hf_condlr.robustness.attacks import Attack, AutoAttack
from studies.paper.lenet5 import ATTACKS
from studies.paper.methods import NAMES, Method
from studies.paper.picture import draw
from studies.paper.study import Entry, Study, TrainingOptions
from studies.record import parse, set_up, write_record
from studies.report import tables
from studies.rows import sweep

CENTERED = [f"tau={tau}{center}" for tau in (0, 0.1, 0.5) for center in ("", ":rms", ":mean")]
METHODS = ["dense", "unconstrained", *CENTERED, "tau=inf", "svd_prune", "cayley", "projected", "penalty=0.1"]


@dataclass
class Options:
    """Which rows the table has, and where it is written."""

    methods: list[str] = option(METHODS, f"Methods to compare: {NAMES}.")
    rank_ratios: list[float] = option(
        [0.5, 0.2], "Rank ratios of every layer but the last; as published (50 and 80 %)."
    )
    learning_rates: list[float] = option([0.05, 0.1, 0.2, 0.4], "The sweep of every method; 0.1 as published.")
    seeds: list[int] = option([0, 1, 2], "Seeds at the chosen learning rate; the first one sweeps.")
    data_dir: str | None = option(None, "Folder that holds mnist/ as parquet files; or CONDLR_DATA.")
    attacked_images: int | None = option(None, "Number of test images, drawn once, that are attacked; else all.")
    autoattack: list[float] = option([], "Radii of AutoAttack, in addition to the other attacks.")
    check_samples: int = option(64, "Images of the first seed's checks; 0 for none.")
    threads: int | None = option(None, "Threads of torch; its own choice if not given.")
    output_dir: str = option("outputs/paper", "Where rows and tables go.")

    def __post_init__(self) -> None:
        self.entries()  # a wrong method is refused before anything is trained

    @property
    def attacks(self) -> list[Attack]:
        """On the test images."""
        return [*ATTACKS, *map(AutoAttack, self.autoattack)]

    def entries(self) -> list[Entry]:
        """The lines of the table."""
        ratios = {name: self.rank_ratios if Method.parse(name).has_rank else [None] for name in self.methods}
        return [Entry(name, ratio) for name in ratios for ratio in ratios[name]]


def main(options: Options, training: TrainingOptions) -> dict[str, Any]:
    """Make the missing rows; write the table after each of them, as Markdown and JSON."""
    set_up(options.threads)
    folder = Path(options.output_dir)
    study = Study(options, training)

    def write(results: dict[str, Any]) -> None:
        write_record(folder / "results.json", results, options, training)
        with replacing(folder / "table.md") as temporary:
            temporary.write_text(
                tables("LeNet5 on MNIST", results, options.attacks, options.learning_rates) + "\n", encoding="utf-8"
            )

    rates, seeds = options.learning_rates, options.seeds
    results = sweep(options.entries(), rates, seeds, train=study.train, test=study.test, write=write)
    if any(not row["diverged"] for row in results["rows"]):
        draw(options.attacks, results["rows"], folder / "fgsm.png")
    print((folder / "table.md").read_text(encoding="utf-8"))
    print("wrote", *sorted(path for path in folder.iterdir() if path.is_file()))
    return results


if __name__ == "__main__":
    main(*parse(Options, TrainingOptions))
