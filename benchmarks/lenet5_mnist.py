"""LeNet5 on MNIST: dense, low rank without constraint, and low rank with κ ≤ 1 + τ; clean and attacked.

The network is that of the method's published experiments (arXiv 2306.01485, Caffe's variant of LeNet5): convolutions
of 20 and 50 filters 5x5, each followed by 2x2 max pooling, then 500 hidden units and 10 logits, leaky ReLU, 431,080
parameters. `--architecture classic` is LeCun's 6-16-120-84-10 with ReLU and padding 2, 61,706 parameters.

Every method trains at every learning rate with one seed; accuracy on held out training images, without attack,
chooses. The other seeds train at the choice only. The test split is used after that, once for each chosen model and
once at the paper's learning rate. Finished runs are kept in the output folder, and a second call goes on from there.
"""

from __future__ import annotations

import logging
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from lenet5_parts import Split, TestOptions, TrainingOptions, build_model, load_mnist, test, train
from record import digest, markdown, mean_and_spread, method_label, sweep_table, write_record
from rows import Rows
from transformers import HfArgumentParser

logger = logging.getLogger("lenet5_mnist")

PAPER_LEARNING_RATE = 0.1


@dataclass
class Options:
    """What the experiment varies, and where it writes."""

    output_dir: str = field(default="outputs/lenet5_mnist", metadata={"help": "Rows, weights and results go here."})
    methods: list[str] = field(
        default_factory=lambda: ["dense", "unconstrained", "tau=0", "tau=0.1", "tau=0.5"],
        metadata={"help": "dense, unconstrained, or tau=NUMBER (tau=inf: orthonormal bases only)."},
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [0.03, 0.1, 0.2, 0.3, 1.0], metadata={"help": "The sweep, the same for every method."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds at the chosen learning rate; the first one sweeps."}
    )
    threads: int = field(
        default=1,
        metadata={"help": "Of torch: more gain little in a network so small, and lose where cores are shared."},
    )


class Experiment:
    """Runs what is missing, and remembers it in the output folder."""

    def __init__(self, options: Options, training: TrainingOptions, testing: TestOptions) -> None:
        self.options, self.training, self.testing = options, training, testing
        self.folder = Path(options.output_dir)
        (self.folder / "weights").mkdir(parents=True, exist_ok=True)
        self.trained, self.tested = Rows(self.folder / "train.jsonl"), Rows(self.folder / "test.jsonl")
        self._data: dict[str, Split] | None = None

    @property
    def data(self) -> dict[str, Split]:
        """Read when first needed: a call that only prints needs no data."""
        if self._data is None:
            self._data = load_mnist(self.training.validation_images)
        return self._data

    def key(self, method: str, learning_rate: float, seed: int) -> dict[str, Any]:
        """Of a trained model; a dense one does not depend on how factored ones start."""
        settings = asdict(self.training)
        if method == "dense":
            del settings["init_weights"], settings["rank_ratio"]
        return {"method": method, "learning_rate": learning_rate, "seed": seed, **settings}

    def weights(self, key: dict[str, Any]) -> Path:
        """Where the trained weights lie: they are attacked later, when the choice is made."""
        return self.folder / "weights" / f"{key['method']}-{digest(key)}.pt"

    def train(self, method: str, learning_rate: float, seed: int) -> dict[str, Any]:
        """The row of one training."""
        key = self.key(method, learning_rate, seed)
        row = self.trained.find(key)
        if row is None:
            result, model = train(method, learning_rate, seed, self.data, self.training)
            torch.save(model.state_dict(), self.weights(key))
            row = self.trained.add(key, result)
            logger.info("%s lr=%g seed=%d: validation %.4f", method, learning_rate, seed, row["validation_accuracy"])
        return row

    def test(self, method: str, learning_rate: float, seed: int) -> dict[str, Any]:
        """The row of one test."""
        trained = self.train(method, learning_rate, seed)
        key = trained["key"] | asdict(self.testing)
        row = self.tested.find(key)
        if row is None:
            model = build_model(method, seed, self.training)
            model.load_state_dict(torch.load(self.weights(trained["key"]), weights_only=True))
            row = self.tested.add(key, test(model, self.data["test"], self.testing))
            logger.info("%s lr=%g seed=%d: test %s", method, learning_rate, seed, {k: row[k] for k in list(row)[1:]})
        return trained | row | {"weights": str(self.weights(trained["key"]).relative_to(self.folder))}

    def choose(self, method: str) -> float:
        """The learning rate of the best validation accuracy, the smaller one of two equal ones."""
        rates = sorted(self.options.learning_rates)
        return max(rates, key=lambda rate: self.train(method, rate, self.options.seeds[0])["validation_accuracy"])

    def run(self) -> dict[str, Any]:
        """Sweep, choose, train the other seeds, test."""
        sweep = [
            self.train(method, rate, self.options.seeds[0])
            for method in self.options.methods
            for rate in self.options.learning_rates
        ]
        chosen = {method: self.choose(method) for method in self.options.methods}
        return {
            "chosen_learning_rates": chosen,
            "best": [self.test(m, rate, seed) for m, rate in chosen.items() for seed in self.options.seeds],
            "paper_setting": [self.test(m, PAPER_LEARNING_RATE, self.options.seeds[0]) for m in chosen],
            "sweep": sweep,
        }


def largest_condition_number(row: dict[str, Any]) -> float:
    """Of all layers; inf where one is not finite."""
    return max(math.inf if value is None else value for value in row["condition_numbers"].values())


def result_table(rows: list[dict[str, Any]]) -> str:
    """A line for each method, over the seeds."""
    lines = []
    for method in dict.fromkeys(row["key"]["method"] for row in rows):
        group = [row for row in rows if row["key"]["method"] == method]
        first = group[0]
        lines.append(
            [
                method_label(method),
                f"{first['key']['learning_rate']:g}",
                f"{first['parameters']:,}",
                mean_and_spread([row["clean_accuracy"] for row in group]),
                mean_and_spread([row["robust_accuracy"] for row in group]),
                f"{max(largest_condition_number(row) for row in group):.4g}",
                f"{len(group)}",
            ]
        )
    return markdown(["method", "learning rate", "parameters", "clean %", "PGD %", "largest κ", "seeds"], lines)


def report(results: dict[str, Any], options: Options, testing: TestOptions) -> str:
    """The three tables as Markdown."""
    attack = f"PGD ℓ∞ ε = {testing.epsilon:g}, {testing.attack_steps} steps, {testing.test_images} test images"
    return "\n\n".join(
        [
            f"Best learning rate of each method by validation accuracy ({attack})",
            result_table(results["best"]),
            f"Learning rate {PAPER_LEARNING_RATE:g} for all, one seed",
            result_table(results["paper_setting"]),
            f"Sweep: validation accuracy in %, seed {options.seeds[0]}",
            sweep_table(results["sweep"], sorted(options.learning_rates)),
            "",
        ]
    )


def main() -> None:
    """Run what is missing, print the tables, write them and the rows as JSON."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    parser = HfArgumentParser((Options, TrainingOptions, TestOptions))
    options, training, testing = parser.parse_args_into_dataclasses()
    torch.set_num_threads(options.threads)
    results = Experiment(options, training, testing).run()
    path = write_record(Path(options.output_dir) / "results.json", results, options, training, testing)
    sys.stdout.write(report(results, options, testing) + f"\nwrote {path}\n")


if __name__ == "__main__":
    main()
