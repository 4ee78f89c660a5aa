r"""Compress a trained model within a bound on κ, and report what that costs; with several bounds, side by side.

    python compress.py --model outputs/vit --dataset_name beans --ratio 0.6 --output_dir outputs/small
    python compress.py configs/compress.yaml --taus 4 1

Any dense classifier of images, texts or tokens, or causal language model, with its processor; any data set that
`datasets.load_dataset` reads, with a split train and test or validation. Started again with the same options it
resumes where it was interrupted. Writes for each bound the model with its card, `report.json` and `report.md`.
`condlr compress` does the same for one bound. Copy this file and change it: it needs no other.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import transformers
from transformers import AutoConfig, AutoProcessor

from hf_condlr import CompressionArguments, ScriptParser, compress
from hf_condlr.robustness.attacks import make_attacks


@dataclass
class SourceArguments:
    """Model, data, bounds and attacks."""

    model: str = field(metadata={"help": "A dense model that is trained for its task, on the Hub or in a folder."})
    dataset_name: str = field(metadata={"help": "Name on the Hub, or a folder of images, parquet, csv or text files."})
    taus: list[float] | None = field(
        default=None, metadata={"help": "Several bounds, each in a folder of its own; by default tau only."}
    )
    attacks: list[str] | None = field(
        default=None, metadata={"help": "pgd-linf, pgd-embedding, ...; by default PGD of 10 steps on images and texts."}
    )
    epsilons: list[str] | None = field(default=None, metadata={"help": "Budgets of each of these attacks: 1/255."})

    def __post_init__(self) -> None:
        if (self.attacks is None) != (self.epsilons is None):
            raise ValueError("attacks and epsilons belong together; give both, or neither")


def main(source: SourceArguments, args: CompressionArguments) -> None:
    """Compress once for each bound, and print the tables."""
    model_class = getattr(transformers, AutoConfig.from_pretrained(source.model).architectures[0])
    model, processor = model_class.from_pretrained(source.model), AutoProcessor.from_pretrained(source.model)
    attacks = make_attacks(source.attacks, source.epsilons) if source.attacks and source.epsilons else None
    for tau in source.taus or [args.tau]:
        folder = Path(args.output_dir, f"tau-{tau:g}") if source.taus else Path(args.output_dir)
        options = vars(replace(args, tau=tau, output_dir=str(folder)))
        _, report = compress(model, source.dataset_name, processor=processor, attacks=attacks, **options)
        print(f"\n{folder}\n\n{report}")


if __name__ == "__main__":
    main(*ScriptParser((SourceArguments, CompressionArguments), description=__doc__.splitlines()[0]).parse())
