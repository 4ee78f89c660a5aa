r"""Attack image or text classifiers, side by side on the same samples, and say how far the result can be trusted.

    accelerate launch recipes/adversarial_evaluation.py --models outputs/dense outputs/condlr --dataset_name beans \
        --attacks pgd-linf pgd-linf-margin fgsm --epsilons 2/255 4/255 8/255 --output_dir outputs/attacked
    accelerate launch recipes/adversarial_evaluation.py recipe.yaml --max_samples 500

Any classifier of transformers, dense, factored or folded, with its image processor or tokenizer; any data set that
`datasets.load_dataset` reads. Started again with the same options it goes on where it was interrupted. Writes a report
(JSON with every parameter and each sample's outcome) for each model, the comparison, and the curves as a picture.

To change it, copy this file and `command_line.py`.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from accelerate import Accelerator
from command_line import parse as parse_into
from command_line import require_joined
from transformers import AutoConfig, AutoProcessor

from hf_condlr import compare, evaluate_robustness, load_split
from hf_condlr.robustness.attacks import Attack, make_attacks


@dataclass
class Arguments:
    """What the command line, or a YAML or JSON file, may set."""

    models: list[str] = field(metadata={"help": "Classifiers, on the Hub or in folders; the first is compared with."})
    dataset_name: str = field(metadata={"help": "Name on the Hub, folder of images or parquet, or a parquet file."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a data set of several."})
    split: str | None = field(default=None, metadata={"help": "test if there is one, else validation, else train."})
    attacks: list[str] = field(
        default_factory=lambda: ["pgd-linf", "pgd-linf-margin"],
        metadata={
            "help": "Names, such as pgd-linf, pgd-l2, autoattack-linf, gaussian_noise, pgd-embedding, characters."
        },
    )
    epsilons: list[str] = field(
        default_factory=lambda: ["2/255", "4/255", "8/255"],
        metadata={"help": "Budgets of every attack: numbers or fractions; severities of corruptions."},
    )
    steps: int | None = field(default=20, metadata={"help": "Gradient steps of the attacks that have them."})
    restarts: int | None = field(default=None, metadata={"help": "Random starts, the worst counts; 1."})
    max_samples: int | None = field(default=None, metadata={"help": "Attack so many, drawn once; all if not given."})
    batch_size: int = field(default=64, metadata={"help": "Samples attacked together, on each process."})
    image_column: str | None = field(default=None, metadata={"help": "Where there are several columns of images."})
    text_columns: list[str] | None = field(default=None, metadata={"help": "Where there are more columns of text."})
    label_column: str | None = field(default=None, metadata={"help": "Where it is not labels or label."})
    checks: bool = field(default=True, metadata={"help": "Look for signs that the attacks failed."})
    save_examples: bool = field(default=False, metadata={"help": "Keep the adversarial examples, as parquet."})
    use_cpu: bool = field(default=False, metadata={"help": "Even if there is a GPU; for several processes without."})
    output_dir: str = field(default="outputs/attacked", metadata={"help": "Folder of reports and picture."})

    def __post_init__(self) -> None:
        self.make_attacks()  # the library checks what it is given: now, not after the models are loaded

    def make_attacks(self) -> list[Attack]:
        return make_attacks(self.attacks, self.epsilons, steps=self.steps, restarts=self.restarts)


def main(args: Arguments) -> None:
    """Attack every model; print, write and draw the comparison."""
    accelerator, folder = Accelerator(cpu=args.use_cpu), Path(args.output_dir)
    require_joined(accelerator.num_processes)
    with accelerator.main_process_first():  # the others find the data in the cache
        data = load_split(args.dataset_name, args.dataset_config_name, args.split)
    options = ("max_samples", "batch_size", "image_column", "text_columns", "label_column", "checks", "save_examples")
    reports = []
    for name, label in zip(args.models, labels(args.models), strict=True):
        architecture = AutoConfig.from_pretrained(name).architectures[0]
        report = evaluate_robustness(
            getattr(transformers, architecture).from_pretrained(name),
            data,
            args.make_attacks(),
            processor=AutoProcessor.from_pretrained(name),
            name=label,
            accelerator=accelerator,
            output_dir=folder / label,
            **{option: getattr(args, option) for option in options},
        )
        accelerator.print(f"\n{report}")
        reports.append(report)
    comparison = compare(reports)
    if accelerator.is_main_process:
        (folder / "comparison.json").write_text(json.dumps(comparison.to_dict(), indent=1) + "\n")
        comparison.plot(folder / "curves.png")
        print(f"\n{comparison}\n\nPicture: {folder}/curves.png. Reports: {folder}/*/report.json")
    accelerator.end_training()


def labels(models: list[str]) -> list[str]:
    """A short name for each model, and for its folder: as much of the end of its path as tells them apart."""
    paths = [Path(model).parts for model in models]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["-".join(path[-length:]).strip("/") for path in paths]
        if len(set(names)) == len(names):
            return names
    raise SystemExit(f"Every model must be named once; received {', '.join(models)}.")


def parse(argv: list[str]) -> Arguments:
    """Of the command line; mistakes in one line."""
    return parse_into((Arguments,), argv, __doc__.splitlines()[0])[0]


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
