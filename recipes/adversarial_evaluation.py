r"""Attack image or text classifiers, side by side on the same samples, and report how far the result can be trusted.

    accelerate launch adversarial_evaluation.py --models outputs/dense outputs/condlr --dataset_name beans \
        --attacks pgd-linf pgd-linf-margin fgsm --epsilons 2/255 4/255 8/255 --output_dir outputs/attacked
    accelerate launch adversarial_evaluation.py configs/attack.yaml --max_attack_samples 500

Any classifier of transformers, dense, factored or folded, with its image processor or tokenizer; any data set that
`datasets.load_dataset` reads. Started again with the same options it resumes where it was interrupted. Writes for each
model a report (JSON with every parameter and each sample's outcome), the comparison, and the curves as a picture.
Copy this file and change it: it needs no other.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from accelerate import Accelerator
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from hf_condlr import AttackArguments, ScriptParser, compare, evaluate_robustness, load_split, require_one_group


@dataclass
class EvaluationArguments:
    """Models and data."""

    models: list[str] = field(metadata={"help": "Classifiers, on the Hub or in folders; the first is the reference."})
    dataset_name: str = field(metadata={"help": "Name on the Hub, folder of images or parquet, or a parquet file."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration, where there are several."})
    split: str | None = field(default=None, metadata={"help": "By default test, else validation, else train."})
    image_column: str | None = field(default=None, metadata={"help": "By default the only column of images."})
    text_columns: list[str] | None = field(default=None, metadata={"help": "By default the only column of text."})
    label_column: str | None = field(default=None, metadata={"help": "By default labels or label."})
    batch_size: int = field(default=64, metadata={"help": "Samples attacked together, on each process."})
    use_cpu: bool = field(default=False, metadata={"help": "Even if there is a GPU; for several processes without."})
    output_dir: str = field(default="outputs/attacked", metadata={"help": "Folder of reports and picture."})

    def __post_init__(self) -> None:
        self.labels()  # refuses a model that is named twice

    def labels(self) -> list[str]:
        """A short name for each model and its folder: as much of the end of its path as tells them apart."""
        paths = [Path(model).parts for model in self.models]
        for length in range(1, max(map(len, paths)) + 1):
            names = ["-".join(path[-length:]).strip("/") for path in paths]
            if len(set(names)) == len(names):
                return names
        raise ValueError(f"every model must be named once; received {', '.join(self.models)}")


def load_model(name: str) -> PreTrainedModel:
    """Load the classifier that the config names."""
    return getattr(transformers, AutoConfig.from_pretrained(name).architectures[0]).from_pretrained(name)


def main(args: EvaluationArguments, attack_args: AttackArguments) -> None:
    """Attack every model; print, write and draw the comparison."""
    accelerator, folder = Accelerator(cpu=args.use_cpu), Path(args.output_dir)
    require_one_group(accelerator.num_processes)
    with accelerator.main_process_first():  # the others find the data in the cache
        data = load_split(args.dataset_name, args.dataset_config_name, args.split)

    reports = []
    for name, label in zip(args.models, args.labels(), strict=True):
        report = evaluate_robustness(
            load_model(name),
            data,
            attack_args.make_attacks() or None,  # by default PGD at several budgets
            processor=AutoProcessor.from_pretrained(name),
            name=label,
            image_column=args.image_column,
            text_columns=args.text_columns,
            label_column=args.label_column,
            batch_size=args.batch_size,
            max_samples=attack_args.max_attack_samples,
            checks=attack_args.attack_checks,
            output_dir=folder / label,
            accelerator=accelerator,
        )
        accelerator.print(f"\n{report}")
        reports.append(report)

    comparison = compare(reports)
    if accelerator.is_main_process:
        (folder / "comparison.json").write_text(json.dumps(comparison.to_dict(), indent=1) + "\n")
        comparison.plot(folder / "curves.png")
        print(f"\n{comparison}\n\nPicture: {folder}/curves.png. Reports: {folder}/*/report.json")
    accelerator.end_training()


if __name__ == "__main__":
    main(*ScriptParser((EvaluationArguments, AttackArguments), description=__doc__.splitlines()[0]).parse())
