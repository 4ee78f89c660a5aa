"""Attacks on the embeddings of a text's tokens: FGM (Miyato et al. 2017), PGD, and a search without gradients.

All share one ball: δ_i ≠ 0 only for tokens that are neither special nor padding, ‖δ_i‖₂ ≤ ε‖E_i‖₂ for each of them,
E_i the output of the input embedding. The radius is relative, as norms differ between tokens and between models.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_condlr.robustness.attacks.ascent import GradientAscent, score_and_gradient
from hf_condlr.robustness.attacks.ball import into_ball, uniform_in_ball, unit
from hf_condlr.robustness.attacks.base import Attack, Inputs, attacked, require, take
from hf_condlr.robustness.attacks.losses import scores
from hf_condlr.robustness.attacks.text import TextModel, require_text_model

WIDEST_TURN, NARROWEST_TURN = 0.6, 0.1  # s of the first and the last query of `EmbeddingSearch`


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
        """The zero perturbation."""
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


class EmbeddingAttack(Attack):
    """Texts or token tensors in, token tensors with a `perturbation` (B, T, d) out; the model is a `TextModel`.

    No text has these embeddings: a model may resist every edit of a text and not these attacks, and the reverse.
    """

    takes: ClassVar[Literal["pixels", "tokens", "texts"]] = "tokens"
    threat = "embedding"

    def __call__(self, model: nn.Module, inputs: Inputs, labels: Tensor) -> Inputs:
        """The batch as token tensors with a perturbation.

        Args:
            model: A `TextModel`.
            inputs: Texts, pairs of texts or token tensors; an existing perturbation is replaced.
            labels: Classes (B,), or probabilities (B, classes).
        """
        model = require_text_model(model)
        with attacked(model):
            ball = TokenBall(model, inputs, self.epsilon)
            return {**ball.tokens, "perturbation": self._perturbation(ball, labels.to(ball.radius.device))}

    @abstractmethod
    def _perturbation(self, ball: TokenBall, labels: Tensor) -> Tensor:
        """The attack's δ (B, T, d)."""

    def distance(self, model: nn.Module, inputs: Inputs, adversarial: Inputs) -> Tensor:  # -> (B,)
        """max_i ‖δ_i‖₂/‖E_i‖₂; inf where a special or padding token was moved, or a token replaced."""
        model = require_text_model(model)
        ball = TokenBall(model, inputs, 1.0)
        length = adversarial["perturbation"].to(ball.radius.device).norm(dim=-1)
        relative = torch.where(length > 0, length / ball.radius, 0.0)
        same = adversarial["input_ids"].to(relative.device) == ball.tokens["input_ids"]
        return torch.where(same, relative, torch.inf).amax(1)


@dataclass(frozen=True)
class EmbeddingFGM(EmbeddingAttack):
    """δ_i = ε‖E_i‖₂ g_i/‖g_i‖₂, g_i = ∇_{E_i} CE: one full step, even where a sample is already misclassified.

    Args:
        epsilon: Radius, as a share of a token's norm.
    """

    epsilon: float
    name = "fgm-embedding"

    def _perturbation(self, ball: TokenBall, labels: Tensor) -> Tensor:
        _, gradient = score_and_gradient(ball.logits, ball.zero(), labels, "ce")
        return ball.steepest(gradient)


@dataclass(frozen=True)
class EmbeddingPGD(GradientAscent, EmbeddingAttack):
    """Projected gradient ascent, δ_i ← Π_i(δ_i + α‖E_i‖₂ g_i/‖g_i‖₂), from a random point of every token's ball.

    Each token has its own ball, so the product of the balls is the unit ball of max_i ‖δ_i‖₂/(ε‖E_i‖₂). Steepest
    ascent in that norm moves every token by its full step. A step normalised over the sentence, as in FreeLB (Zhu et
    al. 2020), belongs to one ball for the sentence: here it would leave most tokens inside their balls. Steps, restarts
    and loss are those of `GradientAscent`.

    Args:
        epsilon: Radius, as a share of a token's norm.
    """

    epsilon: float
    name = "pgd-embedding"

    def _perturbation(self, ball: TokenBall, labels: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        step = 2.5 / self.steps  # as a share of the radius
        if self.step_size is not None:
            step = self.step_size / self.epsilon if self.epsilon > 0 else 0.0
        return self.worst_iterates(
            ball.logits,
            ball.zero(),
            labels,
            start=lambda: ball.uniform(generator),
            move=lambda x, g, index: ball.project(x + step * ball.steepest(g, index), index),
        )


@dataclass(frozen=True)
class EmbeddingSearch(EmbeddingAttack):
    """Random search on the spheres ‖δ_i‖₂ = ε‖E_i‖₂, without gradients, as `Square` for images.

    Each query turns all tokens of a sample by s along one direction u, δ_i ← ε‖E_i‖₂ unit(δ_i/(ε‖E_i‖₂) + s u),
    and keeps it where the margin max_{j≠y} z_j − z_y grows; where it does not, the next query tries −u, as SimBA
    (Guo et al. 2019). u leads from one random token of the vocabulary to another. A gradient attack weaker than this
    one was misled by masked gradients.

    Args:
        epsilon: Radius, as a share of a token's norm.
        queries: Largest number of proposals for each sample; the first that is misclassified is the result.
        seed: Seed of the proposals.
    """

    epsilon: float
    queries: int = 100
    seed: int = 0
    name = "search-embedding"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.queries >= 1, "queries must be ≥ 1", self.queries, "For example 100.")

    @torch.no_grad()
    def _perturbation(self, ball: TokenBall, labels: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        best = ball.zero()
        score = scores(ball.logits(best), labels, "margin")
        direction, retry = torch.zeros_like(best[:, :1]), torch.zeros_like(score, dtype=torch.bool)
        for query in range(self.queries):
            going = (score < torch.inf).nonzero()[:, 0]  # an attack never corrects an error
            if not len(going):
                break
            fresh = ball.directions(generator)  # for all samples, so that none depends on which were stopped
            direction = torch.where(retry[:, None, None], -direction, fresh)
            turn = WIDEST_TURN + (NARROWEST_TURN - WIDEST_TURN) * query / self.queries
            delta = ball.steepest(best + turn * ball.radius[..., None] * direction)[going]
            new = scores(ball.logits(delta, going), labels[going], "margin")
            better = new > score[going]
            best[going[better]], score[going[better]] = delta[better], new[better]
            refused = torch.zeros_like(retry).index_fill(0, going[~better], True)
            retry = refused & ~retry
        return best
