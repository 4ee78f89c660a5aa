"""The inputs that a training perturbs: pixels behind a normalisation, or the embeddings of tokens.

Both classes convert the batches of a training to what attacks take (`clean`), make the attack of one batch (`attack`),
and yield inputs with which the model's forward pass sees what the attack found in some rows (`applied`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hf_condlr.robustness.attacks.base import Attack, require
from hf_condlr.robustness.attacks.embeddings import EmbeddingFGM, EmbeddingPGD
from hf_condlr.robustness.attacks.gradient import FGSM, PGD
from hf_condlr.robustness.attacks.pixels import PixelModel
from hf_condlr.robustness.attacks.text import TextModel, input_embedding, perturbed
from hf_condlr.training.arguments import AdversarialArguments

STEPS = 7  # Madry et al. 2018


class PixelInputs:
    """`pixel_values` that an image processor, or a mean and a standard deviation, made of pixels of [0, 1]."""

    def __init__(self, model: nn.Module, arguments: AdversarialArguments, processor: Any) -> None:
        self.arguments = arguments
        mean, std = arguments.adversarial_image_mean, arguments.adversarial_image_std
        processor = getattr(processor, "image_processor", processor)
        if mean is not None and std is not None:
            self.model = PixelModel(model, mean, std)
            return
        require(
            hasattr(processor, "do_normalize"),
            "adversarial training on images must know how pixels were normalised",
            "no image processor" if processor is None else type(processor).__name__,
            "Give the Trainer processing_class=AutoImageProcessor.from_pretrained(...), or set adversarial_image_mean "
            "and adversarial_image_std (0 and 1 for plain pixels).",
        )
        self.model = PixelModel.from_processor(model, processor)

    def clean(self, inputs: Mapping[str, Any]) -> Tensor:
        """Pixels of [0, 1]."""
        values = inputs["pixel_values"]
        channels = len(self.model.mean)
        require(
            channels in (1, values.shape[1]),
            "mean and standard deviation must be numbers, or one of each for every channel",
            f"{channels} of them for images of shape {tuple(values.shape)}",
            "Take the image processor of this model, or set adversarial_image_mean and adversarial_image_std.",
        )
        return self.model.denormalize(values)

    def attack(self, epsilon: float, seed: int) -> Attack:
        """FGSM, or PGD in the ball of `adversarial_norm`, which continues after a sample is misclassified."""
        if self.arguments.adversarial_attack == "fgsm":
            return FGSM(epsilon)
        norm: Any = self.arguments.adversarial_norm or "linf"
        return PGD(epsilon, norm=norm, steps=self.arguments.adversarial_steps or STEPS, seed=seed, early_stop=False)

    @contextmanager
    def applied(self, inputs: dict[str, Any], rows: Tensor, found: Tensor) -> Iterator[dict[str, Any]]:
        """Inputs with the adversarial pixels, normalised, in `rows`."""
        values = inputs["pixel_values"].clone()
        values[rows] = self.model.normalize(found).to(values.dtype)
        yield inputs | {"pixel_values": values}


class TokenInputs:
    """`input_ids` and the other outputs of a tokenizer; the embeddings of the tokens are perturbed."""

    def __init__(self, model: nn.Module, arguments: AdversarialArguments, tokenizer: Any) -> None:
        self.arguments = arguments
        for name in ("adversarial_norm", "adversarial_image_mean", "adversarial_image_std"):
            value = getattr(arguments, name)
            require(value is None, f"{name} is for images and must be left alone for texts", repr(value), "Drop it.")
        self.model = TextModel(model, tokenizer)

    def clean(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The token tensors without the labels."""
        size = len(inputs["labels"])
        batches = {k: x for k, x in inputs.items() if isinstance(x, Tensor) and x.dim() > 0 and len(x) == size}
        return self.model.tokens({name: value for name, value in batches.items() if name != "labels"})

    def attack(self, epsilon: float, seed: int) -> Attack:
        """FGM, or PGD that continues after a sample is misclassified, on the embeddings."""
        if self.arguments.adversarial_attack == "fgsm":
            return EmbeddingFGM(epsilon)
        return EmbeddingPGD(epsilon, steps=self.arguments.adversarial_steps or STEPS, seed=seed, early_stop=False)

    @contextmanager
    def applied(self, inputs: dict[str, Any], rows: Tensor, found: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
        """The same inputs, while the input embedding adds the perturbation to its output."""
        ids, delta = inputs["input_ids"], found["perturbation"]
        perturbation = delta.new_zeros(*ids.shape, delta.shape[-1])  # (B, T, d)
        perturbation[rows] = delta
        with perturbed(input_embedding(self.model.model), ids, perturbation):
            yield inputs


def perturbed_inputs(
    model: nn.Module, inputs: Mapping[str, Any], arguments: AdversarialArguments, processor: Any
) -> PixelInputs | TokenInputs:
    """The conversion for a batch of pixels or of tokens."""
    kinds = [key for key in ("pixel_values", "input_ids") if key in inputs]
    require(
        len(kinds) == 1,
        "adversarial training perturbs either pixel_values or input_ids",
        f"inputs {', '.join(inputs)}",
        "Train an image or a text classifier, with remove_unused_columns if there are others.",
    )
    return (PixelInputs if kinds == ["pixel_values"] else TokenInputs)(model, arguments, processor)


def class_labels(inputs: Mapping[str, Any]) -> Tensor:  # -> (B,)
    """The labels, one class for each sample; raises AttackError if they are anything else."""
    labels = inputs.get("labels")
    require(
        isinstance(labels, Tensor), "adversarial training needs labels", f"inputs {', '.join(inputs)}", "Add labels."
    )
    require(
        labels.dim() == 1 and not labels.is_floating_point(),  # type: ignore[union-attr]
        "adversarial training is for models that give one class per sample",
        f"labels {labels.dtype} of shape {tuple(labels.shape)}",  # type: ignore[union-attr]
        "For language models and token-level tasks leave adversarial_attack at none.",
    )
    return labels  # type: ignore[return-value]
