"""The published experiments of CondLR (arXiv 2306.01485), all methods alike: one command makes the table.

    python -m studies.paper.table --experiment lenet5_mnist --data_dir path/to/data
    accelerate launch --module studies.paper.table --experiment vgg16_cifar10 --dataset_name uoft-cs/cifar10

SGD, batches of 128, learning rate times 0.3 after 70 and 100 of 120 epochs; with fewer epochs the two places move
proportionally. Every method trains at every learning rate with the first seed; accuracy on clean held-out training
images chooses, and the other seeds train at the choice only. The test split, clean and under attack, is used after
that, once for each chosen model. Rows that are finished are kept, and a row that was killed goes on after its last
epoch: give the same command again. Other methods, rates or seeds add to what is there.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hf_condlr.files import replacing
from studies.paper.experiments import EXPERIMENTS
from studies.paper.methods import NAMES, Method
from studies.paper.picture import draw
from studies.paper.study import Entry, Study, TrainingOptions
from studies.record import option, parse, set_up, write_record
from studies.report import tables
from studies.rows import sweep

CENTERED = [f"tau={tau}{center}" for tau in (0, 0.1, 0.5) for center in ("", ":rms", ":mean")]
METHODS = ["dense", "unconstrained", *CENTERED, "tau=inf", "svd_prune", "cayley", "projected", "penalty=0.1"]


@dataclass
class Options:
    """Which rows the table has, and where it is written."""

    experiment: str = field(metadata={"help": f"One of {', '.join(EXPERIMENTS)}."})
    methods: list[str] = option(METHODS, f"Methods to compare: {NAMES}.")
    rank_ratios: list[float] = option(
        [0.5, 0.2], "Rank ratios of every layer but the last; as published (50 and 80 %)."
    )
    learning_rates: list[float] | None = option(None, "The sweep of every method; else the experiment's own.")
    seeds: list[int] = option([0, 1, 2], "Seeds at the chosen learning rate; the first one sweeps.")
    data_dir: str | None = option(None, "Folder that holds mnist/, cifar10/ or cifar100/ as parquet; or CONDLR_DATA.")
    dataset_name: str | None = option(None, "Name of the images on the Hub, in place of data_dir.")
    attacked_images: int | None = option(None, "Number of test images, drawn once, that are attacked; else all.")
    check_samples: int = option(64, "Images of the first seed's checks; 0 for none.")
    threads: int | None = option(None, "Threads of torch; its own choice if not given.")
    output_dir: str = option("outputs/paper", "Rows and tables go to EXPERIMENT in it.")

    def __post_init__(self) -> None:
        _require(self.experiment in EXPERIMENTS, f"experiment must be one of {', '.join(EXPERIMENTS)}", self.experiment)
        self.learning_rates = list(self.learning_rates or EXPERIMENTS[self.experiment].learning_rates)
        _require(min(self.learning_rates) > 0, "learning_rates must be > 0", self.learning_rates)
        _require(self.seeds, "seeds must name at least one", self.seeds)
        _require(all(0 < ratio <= 1 for ratio in self.rank_ratios), "rank_ratios must lie in (0, 1]", self.rank_ratios)
        self.entries()

    def entries(self) -> list[Entry]:
        """The lines of the table."""
        ratios = {name: self.rank_ratios if Method.parse(name).has_rank else [None] for name in self.methods}
        return [Entry(name, ratio) for name in ratios for ratio in ratios[name]]


def _require(condition: object, rule: str, received: object) -> None:
    if not condition:
        raise ValueError(f"{rule}; received {received!r}")


def main(options: Options, training: TrainingOptions) -> dict[str, Any]:
    """Make the missing rows; write the table after each of them, as Markdown and JSON."""
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        sys.exit(f"A table is made by one process, not {accelerator.num_processes}: --num_processes 1.")
    set_up(options.threads)
    folder = Path(options.output_dir) / options.experiment
    attacks = EXPERIMENTS[options.experiment].attacks
    study = Study(options, training, accelerator.device)

    def write(results: dict[str, Any]) -> None:
        write_record(folder / "results.json", results, options, training)
        with replacing(folder / "table.md") as temporary:
            temporary.write_text(tables(options.experiment, results, attacks, options.learning_rates) + "\n")

    results = sweep(
        options.entries(),
        options.learning_rates,
        options.seeds,
        train=study.train,
        test=study.test,
        write=write,
    )
    if any(not row["diverged"] for row in results["rows"]):
        draw(attacks, results["rows"], folder / "fgsm.png")
    print((folder / "table.md").read_text())
    print("wrote", *sorted(path for path in folder.iterdir() if path.is_file()))
    return results


if __name__ == "__main__":
    main(*parse(Options, TrainingOptions))
