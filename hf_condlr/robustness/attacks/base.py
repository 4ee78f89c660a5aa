"""`Attack`, the interface of all attacks, and `attacked`, which protects a model while it is attacked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from hf_condlr import errors

Inputs = Any  # a batch as the attacked model takes it: pixels, a dictionary of token tensors, or a list of texts


class Attack(ABC):
    """A callable on (model, inputs, labels) that returns inputs of the same kind, made to be misclassified.

    Subclasses are frozen dataclasses of their parameters. `epsilon` is the adversary's budget: a radius in pixels of
    [0, 1], a share of a token's norm, a share of words, a severity. The model maps inputs to logits (B, classes). An
    attack leaves its training flags, gradients, parameters and random states as they were.
    """

    epsilon: float
    takes: ClassVar[Literal["pixels", "tokens", "texts"]] = "pixels"
    """Kind of inputs. An attack on tokens also takes texts, and tokenises them."""
    adversarial: ClassVar[bool] = True
    """False for corruptions, which ignore the model and may correct an error."""
    within_bounds: ClassVar[bool] = True
    """Whether pixels stay in [0, 1]."""

    def __post_init__(self) -> None:
        finite = 0 <= self.epsilon < float("inf")
        require(finite, "epsilon must be finite and ≥ 0", self.epsilon, "For example 8/255 for pixels.")

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in `make_attack`, such as `pgd-linf`."""

    @property
    @abstractmethod
    def threat(self) -> str:
        """Threat model: `linf`, `l2`, `embedding`, ... Worst cases are taken within one of these."""

    @abstractmethod
    def __call__(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> Inputs:
        """Adversarial inputs for a batch and its labels (B,)."""

    def distance(self, model: nn.Module, inputs: Inputs, adversarial: Inputs) -> Tensor | None:
        """Distance (B,) of each sample from its original, at most `epsilon`; None where it is not measured."""
        return None

    def with_epsilon(self, epsilon: float) -> Self:
        """The same attack with another budget."""
        return replace(self, epsilon=epsilon)  # type: ignore[type-var]

    def reseeded(self, index: int) -> Self:
        """The same attack with the random numbers of batch `index` of a data set."""
        seed = getattr(self, "seed", None)
        return self if seed is None else replace(self, seed=seed + 1_000_003 * index)  # type: ignore[type-var]

    def settings(self) -> dict[str, Any]:
        """Name, threat and every parameter, as JSON values."""
        values = asdict(self)  # type: ignore[call-overload]
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"attack": self.name, "threat": self.threat, **values}


@contextmanager
def attacked(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout), gradients on, autocast off; afterwards flags and random states are as before.

    Attacks compute in float32 even inside autocast: in half precision the sign of a gradient is often noise.
    """
    training = [module for module in model.modules() if module.training]
    wrapped = [module for module in model.modules() if {"forward", "_original_forward"} <= set(module.__dict__)]
    forwards = [module.forward for module in wrapped]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    model.eval()
    for module in wrapped:  # accelerate puts autocast into a prepared model's forward, where no context can end it
        module.forward = cast(Any, module)._original_forward
    try:
        with (
            torch.random.fork_rng(devices),  # a model may draw random numbers even in evaluation mode
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cuda", enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        for module, forward in zip(wrapped, forwards, strict=True):
            module.forward = forward
        for module in training:
            module.training = True


def logits_of(output: Any) -> Tensor:  # -> (B, classes)
    """Logits in float32 (or float64) from a model's output: a tensor, a transformers output, or a tuple."""
    if not isinstance(output, Tensor):
        output = output["logits"] if isinstance(output, Mapping) else getattr(output, "logits", output[0])
    return output.to(torch.promote_types(output.dtype, torch.float32))


def at_least_float32(inputs: Tensor) -> Tensor:
    """Detached inputs in float32 (or float64): rounding to half precision would leave the ball."""
    inputs = inputs.clone() if inputs.is_inference() else inputs.detach()  # inference tensors have no gradients
    return inputs.to(torch.promote_types(inputs.dtype, torch.float32))


def count(inputs: Inputs) -> int:
    """Samples in a batch."""
    return len(next(iter(inputs.values()))) if isinstance(inputs, Mapping) else len(inputs)


def take(inputs: Inputs, index: Tensor) -> Inputs:
    """The samples `index` (k,) of a batch."""
    if isinstance(inputs, Mapping):
        return {name: value[index.to(value.device)] for name, value in inputs.items()}
    if isinstance(inputs, Tensor):
        return inputs[index.to(inputs.device)]
    return [inputs[i] for i in index.tolist()]


def require(condition: object, rule: str, received: object, remedy: str) -> None:
    """`errors.require` with `AttackError`."""
    errors.require(condition, rule, received=received, remedy=remedy, error=errors.AttackError)


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Require one of a few names."""
    listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
    require(value in choices, f"{name} must be {listed}", repr(value), "Choose one.")


def require_pixels(inputs: Tensor) -> None:
    """Require floating point values in [0, 1], and at least one sample."""
    require(inputs.is_floating_point(), "inputs must be floating point", inputs.dtype, "Divide 8-bit pixels by 255.")
    require(len(inputs), "inputs must hold at least one sample", "none", "Skip empty batches.")
    low, high = inputs.min().item(), inputs.max().item()
    remedy = "Put the normalisation inside the model: PixelModel(model, mean, std)."
    require(low >= 0 and high <= 1, "inputs must be pixels of [0, 1]", f"values from {low:.3g} to {high:.3g}", remedy)


def require_images(inputs: Tensor) -> None:
    """Require pixels of images (B, C, H, W)."""
    require_pixels(inputs)
    require(inputs.dim() == 4, "inputs must be images (B, C, H, W)", tuple(inputs.shape), "Reshape them.")
