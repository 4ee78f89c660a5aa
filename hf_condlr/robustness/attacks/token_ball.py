"""`TokenBall`: the perturbations that attacks on embeddings may choose from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_condlr.robustness.attacks.ball import into_ball, uniform_in_ball, unit
from hf_condlr.robustness.attacks.base import Inputs, take
from hf_condlr.robustness.attacks.text import TextModel


class TokenBall:
    """{δ : ‖δ_i‖₂ ≤ ε‖E_i‖₂ for every token i of every sample}, E_i the output of the input embedding.

    Special tokens and padding have radius 0.

    Args:
        model: Gives embeddings and logits.
        inputs: Texts, or token tensors, whose perturbation is ignored.
        epsilon: Radius as a share of a token's norm.
    """

    def __init__(self, model: TextModel, inputs: Inputs, epsilon: float) -> None:
        given = inputs if isinstance(inputs, Mapping) else model.encode(inputs)
        self.tokens = model.tokens({name: value for name, value in given.items() if name != "perturbation"})
        self.model, self.embedded = model, model.embed(self.tokens)  # (B, T, d)
        self.radius = epsilon * self.embedded.norm(dim=-1) * model.editable(self.tokens)  # (B, T)

    def logits(self, delta: Tensor, index: Tensor | None = None) -> Tensor:  # (k, T, d), (k,) -> (k, classes)
        """Logits of the samples `index` (all without it), perturbed by δ."""
        tokens = self.tokens if index is None else take(self.tokens, index)
        return self.model({**tokens, "perturbation": delta})

    def zero(self) -> Tensor:  # (B, T, d)
        """No perturbation."""
        return torch.zeros_like(self.embedded)

    def uniform(self, generator: torch.Generator) -> Tensor:  # (B, T, d)
        """A random point of every token's ball."""
        noise = uniform_in_ball((self.radius.numel(), self.embedded.shape[-1]), generator)
        return self.radius[..., None] * noise.view(self.embedded.shape).to(self.radius)

    def directions(self, generator: torch.Generator) -> Tensor:  # (B, 1, d), of norm 1
        """For each sample a direction from one random token of the vocabulary to another.

        The model responds more to these than to directions uniform on the sphere, where hardly any token lies.
        """
        ids = torch.randint(self.model.vocabulary, (len(self.embedded), 2), generator=generator)
        embedded = self.model.embed({"input_ids": ids})
        return unit(embedded[:, :1] - embedded[:, 1:])

    def steepest(self, gradient: Tensor, index: Tensor | None = None) -> Tensor:  # (k, T, d), (k,) -> (k, T, d)
        """The point that maximises the product with the gradient: δ_i = ε‖E_i‖₂ g_i/‖g_i‖₂."""
        radius = self.radius if index is None else self.radius[index]
        return radius[..., None] * unit(gradient.flatten(0, 1)).view(gradient.shape)

    def project(self, delta: Tensor, index: Tensor) -> Tensor:  # (k, T, d), (k,) -> (k, T, d)
        """The nearest point of the ball."""
        return into_ball(delta.flatten(0, 1), self.radius[index].flatten()).view(delta.shape)
