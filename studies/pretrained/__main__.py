r"""Real pretrained models, compressed in several ways, with and without a recovery; a table a command.

    python -m studies.pretrained --task sst2 --model_path OUT/minilm-sst2 --data sst2 --output_dir outputs/minilm
    python -m studies.pretrained --task imagenette --model_path OUT/dinov2-imagenette --data imagenette \
        --methods dense svd ours-4 --recovery_steps 150 --seeds 0 1 2 --output_dir outputs/dinov2

`python -m studies.pretrained.dense` fine-tunes the models. Every row is kept: a second call with the same settings
goes on where the first one ended, and one with more methods measures those only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hf_condlr.options import option
from hf_condlr.robustness.attacks.registry import parse_epsilon
from studies.pretrained.experiment import ATTACKED_TRAINING, Experiment, Samples, Variant
from studies.pretrained.methods import COMPARED, METHODS
from studies.pretrained.report import draw, table
from studies.pretrained.tasks import load_task
from studies.record import parse, set_up, write_record
from studies.rows import sweep


@dataclass
class Options:
    """What is compared."""

    task: str = field(metadata={"help": "imagenette or sst2.", "choices": ["imagenette", "sst2"]})
    model_path: str = field(metadata={"help": "Folder of the fine-tuned model."})
    data: str = field(metadata={"help": "Folder with the splits as parquet files."})
    output_dir: str = field(metadata={"help": "Rows, models, results.json and results.png go here."})
    methods: list[str] = option(list(COMPARED), f"What is compared: {', '.join(METHODS)}.")
    ratios: list[float] = option([0.6], "Shares of the weights of the encoder's linear layers that are removed.")
    recovery_steps: int = option(0, "Optimizer steps of distillation after compression; 0: none.")
    adversarial: float = option(
        0.0,
        "Recover on adversarial samples of this ε too (1/255 is 0.0039); 0: none. The rate is then chosen by the mean "
        "of clean and robust accuracy.",
    )
    attack: str = option(
        "fgsm",
        "How they are found: fgsm, half of each batch by one step; pgd, half by three; trades, all by three.",
        choices=list(ATTACKED_TRAINING),
    )
    learning_rates: list[float] = option([1e-4], "Sweep of the recovery, the same for every method.")
    seeds: list[int] = option([0], "Of the recovery; the first one sweeps.")
    calibration: int = option(256, "Training samples that starts and ranks see.")
    clean: int = option(500, "Test samples of the clean accuracy, drawn once; more than there are: all.")
    attacked: int = option(100, "Test samples that are attacked, drawn once.")
    attack_steps: int = option(5, "Steps of PGD.")
    epsilons: list[str] | None = option(None, "Budgets such as 1/255 or 0.05; by default two for each task.")
    queries: int = option(0, "Queries of an attack without gradients in addition to PGD; 0: none.")
    check: str | None = option(None, "A method whose attacks are checked for signs of weakness.")
    bf16: bool = option(True, "Recover with forward passes in bfloat16.")
    threads: int = option(1, "Threads of torch.")

    def __post_init__(self) -> None:
        if unknown := [name for name in [*self.methods, *filter(None, [self.check])] if name not in METHODS]:
            raise ValueError(f"methods must be among {', '.join(METHODS)}; received {', '.join(unknown)}")
        if wrong := [ratio for ratio in self.ratios if not 0 < ratio < 1]:
            raise ValueError(f"ratios must lie between 0 and 1; received {wrong}")
        if self.adversarial and not self.recovery_steps:
            raise ValueError("adversarial needs recovery_steps")
        if self.attack != "fgsm" and not self.adversarial:
            raise ValueError("attack needs adversarial, its ε")


def main() -> None:
    """Run what is missing, print the table, write the record, draw."""
    [options] = parse(Options)
    set_up(options.threads)
    task = load_task(options.task, options.data, options.model_path)
    epsilons = tuple(map(parse_epsilon, options.epsilons or ()))
    numbers = (options.calibration, options.clean, options.attacked, options.attack_steps)
    samples = Samples(*numbers, epsilons, options.queries)
    output = Path(options.output_dir)
    experiment = Experiment(task, options.model_path, output / "rows", samples, bf16=options.bf16)
    recovery = (options.recovery_steps, options.adversarial, options.attack)
    variants = [
        Variant(method, 0.0 if method == "dense" else ratio, *recovery)
        for ratio in options.ratios
        for method in options.methods
        if method != "dense" or ratio == options.ratios[0]
    ]
    rates, seeds = (options.learning_rates, options.seeds) if options.recovery_steps else ([0.0], [options.seeds[0]])

    def test(variant: Variant, rate: float, seed: int) -> dict[str, object]:
        return experiment.test(variant, rate, seed, checks=variant.method == options.check and seed == seeds[0])

    results = sweep(variants, rates, seeds, train=experiment.train, test=test)
    latency = experiment.latency([variant for variant in variants if variant.method != "dense"])
    for row in results["rows"]:
        row["milliseconds"] = latency["dense" if row["method"] == "dense" else f"{row['method']} {row['ratio']:g}"]
    dense = experiment.test(Variant("dense", 0.0), 0.0, seeds[0])
    print(table(results["rows"], dense))
    name = f"results-{options.recovery_steps}" + (f"-{options.adversarial:g}" if options.adversarial else "")
    name += f"-{options.attack}" if options.attack != "fgsm" else ""
    record, picture = write_record(output / f"{name}.json", results, options), output / f"{name}.png"
    start = [dense | experiment.train(Variant("dense", 0.0), 0.0, seeds[0])] if options.recovery_steps else []
    draw([*start, *results["rows"]], picture)
    print("\nwrote", record, picture)


if __name__ == "__main__":
    main()
