"""The parts of the run: the question of each, its command line, and its share of the time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A program that writes a record of its own.

    Attributes:
        name: Of the record, NAME.json.
        question: What it answers.
        module: The program.
        share: Of the time, in relation to the other parts.
        options: Its command line on a GPU.
        small: That of `--smoke`.
        takes_seconds: Whether the program is told how many seconds it has.
    """

    name: str
    question: str
    module: str
    share: float
    options: str
    small: str
    takes_seconds: bool = False

    def command(self, seconds: float, smoke: bool) -> list[str]:
        """Arguments of `python`; the last is followed by the record's path."""
        told = ["--seconds", f"{0.9 * seconds:.0f}"] if self.takes_seconds else []
        return ["-m", self.module, *(self.small if smoke else self.options).split(), *told, "--output"]


PARTS = (
    Part(
        "environment",
        "Does everything that only a GPU runs work, and what rates does this card reach?",
        "benchmarks.gpu.environment",
        1.6,
        "--rounds 3",
        "--rounds 1 --size 32 --stack 2 --rank 8",
    ),
    Part(
        "step",
        "What does the manifold step cost beside its bare products and a loop of QR and SVD; what would TF32 gain; is "
        "eigh or are products faster?",
        "benchmarks.manifold_step",
        1.6,
        "--models vit-b vit-l llama-1b --compression_ratio 0.6 --rounds 5 --longest 1 --conditioning true "
        "--methods step loop products",
        "--models tiny --rounds 1 --conditioning true",
    ),
    Part(
        "training_vit",
        "What share of a training step of ViT-B/16 is the manifold step, and how much memory does each method take?",
        "benchmarks.training_step",
        1.3,
        "--models vit-b16 --batch_size 128 --dtype bfloat16 --rank_multiple 8 --init_weights orthogonal "
        "--intervals 1 4 --rounds 7",
        "--models tiny --batch_size 2 --tokens 4 --rounds 1 --intervals 1 2 --memory false",
    ),
    Part(
        "training_llama",
        "The same on the blocks of a 1B Llama.",
        "benchmarks.training_step",
        1.4,
        "--models llama-1b --batch_size 8 --tokens 1024 --dtype bfloat16 --rank_multiple 8 --init_weights orthogonal "
        "--intervals 1 4 --rounds 5",
        "--models tiny-llama --batch_size 2 --tokens 4 --rounds 1 --memory false",
    ),
    Part(
        "inference",
        "How much faster than dense are folded models at batch 1 and 64?",
        "benchmarks.inference",
        1.2,
        "--layers 12 --dtype bfloat16 --rank_multiple 8 --compression_ratios 0.6 0.75 --rounds 9",
        "--model tiny --tokens 4 --batch_sizes 1 2 --compression_ratios 0.6 --rounds 1 --compiled false",
    ),
    Part(
        "cifar",
        "How accurate and how robust is VGG16 on CIFAR-10 after as many epochs as fit, and what does an epoch cost?",
        "benchmarks.gpu.cifar",
        2.6,
        "",
        "--images 16 --attacked 2 --epochs 1 --batch_size 8 --width 0.05",
        takes_seconds=True,
    ),
)
