"""`compress`: measure, calibrate, choose ranks, factor within the bound, recover, measure again, save."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from hf_condlr.compression.arguments import CompressionArguments
from hf_condlr.compression.report import CompressionReport
from hf_condlr.robustness.attacks.base import Attack


class Compressed(NamedTuple):
    """The compressed model, and what it was measured to be."""

    model: Any
    report: CompressionReport


def compress(
    model: PreTrainedModel,
    data: Any,
    *,
    output_dir: str | Path,
    processor: Any = None,
    ratio: float | None = None,
    max_drop: float | None = None,
    tau: float | None = None,
    attacks: Iterable[Attack] | Attack | None = None,
    **options: Any,
) -> Compressed:
    """Compress a trained model within κ ≤ 1 + τ, measure it before and after, and save it with its card.

    Calibration and recovery see the training split only. The result is measured on the test split, or else on the
    validation split; `max_drop` chooses on the validation split, or on half of the only one. Started again with the
    same call after a kill, it resumes from the last complete step.

    Args:
        model: A dense classifier of images, texts or tokens, or a causal language model, trained for its task. It
            stays as it is.
        data: A `DatasetDict` with the splits train and test or validation, a name on the Hub, or a folder.
        output_dir: Folder for the model, its card, `report.json`, `report.md` and the picture of the search.
        processor: The model's image processor or tokenizer.
        ratio: Share of the converted layers' weights to remove.
        max_drop: Instead: remove as much as costs at most so many points of accuracy, or percent of the perplexity.
        tau: κ(S) ≤ 1 + tau in every converted layer; by default 4, and no bound for a language model.
        attacks: Attacks that the report measures; by default PGD with ε = 1/255 on pixels, 0.02 on embeddings of
            texts, and none on tokens' classifiers and language models; `()` for none.
        options: Further fields of `CompressionArguments`: layers, start, recovery, columns, numbers of samples.

    Returns:
        The compressed model and the report; `model, report = compress(...)`.

    Raises:
        ConfigError: An option is not valid, no ratio is within `max_drop`, the model is compressed already, or
            `output_dir` holds something else or a run with other settings.
        EvaluationError: The data have no labels that fit the model, or a split is missing.
        ConversionError: No layer can be converted.

    Examples:
        >>> model = AutoModelForSequenceClassification.from_pretrained("path/to/model")
        >>> tokenizer = AutoTokenizer.from_pretrained("path/to/model")
        >>> small, report = compress(model, "path/to/data", ratio=0.6, processor=tokenizer, output_dir="small")
        >>> print(report)
    """
    given: dict[str, Any] = {"output_dir": str(output_dir), "ratio": ratio, "max_drop": max_drop, "tau": tau}
    args = CompressionArguments(**given, **options)
    from hf_condlr.compression.run import Run  # needs datasets

    run = Run(model, data, processor, attacks, args)
    return Compressed(*(run.finished() or run.compress()))
