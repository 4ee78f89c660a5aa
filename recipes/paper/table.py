r"""The published experiments of CondLR (arXiv 2306.01485), all methods alike: one command makes the table.

    python recipes/paper/table.py --experiment lenet5_mnist --data_dir path/to/data
    accelerate launch recipes/paper/table.py --experiment vgg16_cifar10 --dataset_name uoft-cs/cifar10
    python recipes/paper/table.py options.yaml --epochs 3 --subset 20000 --seeds 0

Every method trains at every learning rate with the first seed; accuracy on clean held-out training images chooses, and
the other seeds train at the choice only. The test split, clean and under attack, is used after that, once for each
chosen model. Rows that are finished are kept, and a row that was killed goes on after its last epoch: give the same
command again. Other methods, rates or seeds add to what is there.
"""

import logging
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from experiments import EXPERIMENTS
from methods import NAMES, Method
from picture import draw
from report import environment, tables
from resuming import write_text
from study import Entry, Study, write_json
from training import Job, TrainingOptions

sys.path += [str(Path(__file__).resolve().parents[k]) for k in (1, 2)]
from command_line import parse, require

logger = logging.getLogger("paper")
CENTERED = [f"tau={tau}{center}" for tau in (0, 0.1, 0.5) for center in ("", ":rms", ":mean")]


@dataclass
class Options:
    """Which rows the table has, and where it is written."""

    experiment: str = field(metadata={"help": f"One of {', '.join(EXPERIMENTS)}."})
    methods: list[str] = field(
        default_factory=lambda: [
            *("dense", "unconstrained", *CENTERED, "tau=inf"),
            *("svd_prune", "cayley", "projected", "penalty=0.1"),
        ],
        metadata={"help": f"Of {NAMES}; @RATIO after one of low rank stands for rank_ratios."},
    )
    rank_ratios: list[float] = field(
        default_factory=lambda: [0.5, 0.2],
        metadata={"help": "Of every layer but the last; the published compression ratios 50 and 80 % are 0.5 and 0.2."},
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "The sweep, the same for every method; the experiment's own if not given."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds at the chosen learning rate; the first one sweeps."}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder that holds mnist/, cifar10/ or cifar100/ as parquet; or CONDLR_DATA."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Of the images on the Hub, in place of data_dir."})
    attacked_images: int | None = field(
        default=None, metadata={"help": "Attack so many test images, drawn once; all if not given."}
    )
    check_samples: int = field(default=64, metadata={"help": "Images of the first seed's checks; 0 for none."})
    threads: int | None = field(default=None, metadata={"help": "Of torch on a CPU; as torch finds best if not given."})
    output_dir: str = field(default="outputs/paper", metadata={"help": "Rows and tables go to EXPERIMENT in it."})

    def __post_init__(self) -> None:
        require(self.experiment in EXPERIMENTS, f"experiment must be one of {', '.join(EXPERIMENTS)}", self.experiment)
        self.learning_rates = list(self.learning_rates or EXPERIMENTS[self.experiment].learning_rates)
        require(min(self.learning_rates) > 0, "learning_rates must be > 0", self.learning_rates)
        require(self.seeds, "seeds must name at least one", self.seeds)
        require(all(0 < ratio <= 1 for ratio in self.rank_ratios), "rank_ratios must lie in (0, 1]", self.rank_ratios)
        self.entries()

    def entries(self) -> list[Entry]:
        """The lines of the table, each once."""
        entries = []
        for word in self.methods:
            name, _, ratio = word.partition("@")
            has_rank = Method.parse(name).has_rank
            require(has_rank or not ratio, "a method of full rank takes no rank ratio", word)
            require(not ratio or 0 < float(ratio) <= 1, "a rank ratio must lie in (0, 1]", word)
            ratios = [float(ratio)] if ratio else self.rank_ratios
            entries += [Entry(name, r) for r in ratios] if has_rank else [Entry(name, None)]
        return list(dict.fromkeys(entries))


def main(options: Options, training: TrainingOptions) -> dict[str, Any]:
    """Make the missing rows; write the table after each of them, as Markdown and JSON."""
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        sys.exit(f"A table is made by one process, not {accelerator.num_processes}: --num_processes 1.")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    folder = Path(options.output_dir) / options.experiment
    study = Study(
        options.experiment,
        training,
        folder,
        data_dir=options.data_dir,
        dataset_name=options.dataset_name,
        attacked_images=options.attacked_images,
        check_samples=options.check_samples,
        device=accelerator.device,
    )
    results: dict[str, Any] = {"chosen": [], "rows": [], "sweep": []}

    def write() -> None:
        write_json(folder / "results.json", environment(options, training) | results)
        write_text(folder / "table.md", tables(options.experiment, results, options.learning_rates) + "\n")

    first, rates = options.seeds[0], sorted(options.learning_rates)
    for entry in options.entries():
        results["sweep"] += [study.train(Job(**asdict(entry), learning_rate=rate, seed=first)) for rate in rates]
        results["chosen"].append({**asdict(entry), "learning_rate": study.choose(entry, rates, first)})
        write()
    for seed in options.seeds:
        for choice in results["chosen"]:
            if choice["learning_rate"] is not None:
                results["rows"].append(study.test(Job(**choice, seed=seed), checks=seed == first))
            write()
    drawn = [folder / "fgsm.png"] if draw(options.experiment, results["rows"], folder / "fgsm.png") else []
    print((folder / "table.md").read_text())
    print("wrote", *[folder / "table.md", folder / "results.json", *drawn])
    return results


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    transformers.utils.logging.disable_progress_bar()
    main(*parse((Options, TrainingOptions), sys.argv[1:], __doc__.splitlines()[0]))
