r"""Fine-tune a pretrained encoder, dense: a sweep of learning rates on few steps, then a training at the best one.

    python -m studies.pretrained.dense --task imagenette --model_path dinov2-small --data imagenette --output_dir OUT

Validation accuracy chooses the rate. Killed and started again, it goes on from the last checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed

from hf_condlr.options import option
from studies.pretrained.tasks import load_task
from studies.pretrained.training import fit_head, fitted
from studies.record import environment, logger, parse, set_up, write_json
from studies.rows import Rows


@dataclass
class Options:
    """What is fine-tuned, and how."""

    task: str = field(metadata={"help": "imagenette or sst2.", "choices": ["imagenette", "sst2"]})
    model_path: str = field(metadata={"help": "Folder of the pretrained model."})
    data: str = field(metadata={"help": "Folder with the splits as parquet files."})
    output_dir: str = field(metadata={"help": "Folder of the fine-tuned model."})
    learning_rates: list[float] = option([5e-5], "The sweep; a single rate is taken as it is.")
    sweep_steps: int = option(60, "Optimizer steps of each training of the sweep.")
    head_samples: int = option(0, "Training samples whose frozen features first train the classifier alone; 0: none.")
    steps: int = option(300, "Optimizer steps of 32 samples.")
    least_area: float = option(0.35, "Smallest crop of a training image, as a share of its area.")
    seed: int = option(0, "Seed of classifier, order and crops.")
    bf16: bool = option(True, "Forward passes in bfloat16.")
    threads: int = option(2, "Threads of torch.")


def main() -> None:
    """Sweep, train, test, save."""
    [options] = parse(Options)
    set_up(options.threads)
    task = load_task(options.task, options.data, options.model_path, least_area=options.least_area)
    output = Path(options.output_dir)
    same = {"seed": options.seed, "free": True, "bf16": options.bf16}

    def train(folder: Path, rate: float, steps: int) -> dict[str, object]:
        set_seed(options.seed)
        model = task.model(options.model_path)
        if options.head_samples:
            fit_head(task, model, options.head_samples, bf16=options.bf16)
        result = fitted(task, model, folder, rate=rate, steps=steps, **same)
        if steps == options.steps:
            model.save_pretrained(output)
            task.processor.save_pretrained(output)
        return {"learning_rate": rate, **result}

    rows, key = Rows(output / "rows"), {"task": options.task, "model": Path(options.model_path).name, **same}
    key |= {"head_samples": options.head_samples, "least_area": options.least_area}
    sweep = []
    if len(options.learning_rates) > 1:
        for rate in options.learning_rates:
            settings = key | {"rate": rate, "steps": options.sweep_steps}
            make = lambda folder, rate=rate: train(folder, rate, options.sweep_steps)  # noqa: E731
            sweep.append(rows.row(f"sweep {rate:g}", settings, make))
    best = (
        max(sweep, key=lambda row: row["validation_accuracy"])["learning_rate"] if sweep else options.learning_rates[0]
    )
    settings = key | {"rate": best, "steps": options.steps}
    row = rows.row("final", settings, lambda folder: train(folder, best, options.steps))
    write_json(output / "training.json", environment(options) | {"sweep": sweep, "final": row})
    logger.info("%s: rate %g, validation accuracy %.4f", output, best, row["validation_accuracy"])


if __name__ == "__main__":
    main()
