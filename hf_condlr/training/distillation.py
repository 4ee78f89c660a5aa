"""Distillation: the student also learns the outputs of a dense teacher, in the form that fits the task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_condlr.errors import ConfigError, require
from hf_condlr.robustness.evaluation.rows import class_names


def kl_divergence(logits: Tensor, target_logits: Tensor) -> Tensor:  # (*, classes), (*, classes) -> (*)
    """KL(softmax(target) ‖ softmax(z)) of each sample or token, in at least float32; both sides have gradients."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_q, log_p = (F.log_softmax(z.to(wide), dim=-1) for z in (logits, target_logits))
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def bernoulli_divergence(logits: Tensor, target_logits: Tensor) -> Tensor:  # (*), (*) -> (*)
    """KL(Bernoulli(σ(target)) ‖ Bernoulli(σ(z))) of each entry, in at least float32."""
    pair = (torch.stack([z, torch.zeros_like(z)], dim=-1) for z in (logits, target_logits))
    return kl_divergence(*pair)


def distillation_loss(
    logits: Tensor, teacher_logits: Tensor, temperature: float, mask: Tensor | None = None, *, multi_label: bool = False
) -> Tensor:  # (*, classes), (*, classes), (*) -> ()
    """T² KL(softmax(z_t/T) ‖ softmax(z/T)), mean over the samples or tokens where the mask is true.

    With `multi_label`, each class is a separate decision: the mean of T² KL(σ(z_t/T) ‖ σ(z/T)) over all entries.

    Source: Hinton, Vinyals, Dean 2015, section 2.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)  # before the division
    divergence = bernoulli_divergence if multi_label else kl_divergence
    divergences = divergence(logits.to(wide) / temperature, teacher_logits.to(wide) / temperature)
    if mask is not None and mask.shape == divergences.shape:
        divergences = divergences[mask.bool()]
    return temperature**2 * divergences.mean()


def is_causal_model(model: nn.Module) -> bool:
    """Whether position t of the logits predicts label t + 1."""
    return type(_without_adapter(model)).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def predicted_labels(labels: Tensor, is_causal: bool) -> Tensor:
    """The labels that are predicted: all, or all except the first one of each sample."""
    return labels[:, 1:] if is_causal and labels.dim() == 2 else labels


class Distillation:
    """The loss of a student against a teacher.

    Its form is that of the task's own loss: KL of the class probabilities for single-label classification, of tokens
    for token classification and language models (a causal one predicts the next token), of start and end positions for
    question answering; KL of each class's probability for multi-label classification; the squared error for
    regression. The teacher of a sequence-to-sequence model decodes the labels, as the student does.

    Args:
        teacher: A dense model. Classes are matched by their names, `config.id2label`.
        student: The model that is trained.
        temperature: T.
        label_names: The inputs that are labels; the teacher does not get them.

    Raises:
        ConfigError: Teacher and student do not have the same classes.
    """

    def __init__(
        self, teacher: nn.Module, student: nn.Module, temperature: float, label_names: Iterable[str] = ("labels",)
    ) -> None:
        self.teacher = teacher.eval()
        self.temperature = temperature
        self.label_names = {*label_names, "labels"}
        self.config, self.is_causal = getattr(student, "config", None), is_causal_model(student)
        student = _without_adapter(student)
        is_classifier = type(student).__name__.endswith("Classification")
        self.order = _class_order(student, teacher) if is_classifier else None

    def __call__(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """The mean over the samples or tokens of a batch, from the student's outputs for `inputs`, with labels."""
        labels = inputs.get("labels")
        decodes = getattr(self.config, "is_encoder_decoder", False) and labels is not None and labels.dim() == 2
        hidden = self.label_names - {"labels"} if decodes else self.label_names
        with torch.no_grad():
            targets = self.teacher(**{name: value for name, value in inputs.items() if name not in hidden})
        if "start_logits" in outputs:
            pairs = ((outputs[name], targets[name]) for name in ("start_logits", "end_logits"))
            return torch.stack([self._term(z, t, None, None) for z, t in pairs]).mean()
        return self._term(outputs["logits"], targets["logits"], labels, inputs.get("attention_mask"))

    def _term(self, logits: Tensor, target: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
        if self.order is not None:
            target = target[..., self.order.to(target.device)]
        require(
            logits.shape == target.shape,
            "teacher and student must give logits of the same shape",
            received=f"{tuple(target.shape)} of the teacher, {tuple(logits.shape)} of the student",
            remedy="Take a teacher with the same labels or vocabulary.",
            error=ConfigError,
        )
        problem = self._problem(logits, labels)
        if problem == "regression":
            wide = torch.promote_types(logits.dtype, torch.float32)
            return F.mse_loss(logits.to(wide), target.to(wide))
        if problem == "multi_label_classification":
            return distillation_loss(logits, target, self.temperature, multi_label=True)
        if labels is not None and labels.shape == logits.shape[:-1]:
            if self.is_causal:
                logits, target = logits[:, :-1], target[:, :-1]  # position t predicts t + 1
            mask = predicted_labels(labels, self.is_causal).ne(-100)
        return distillation_loss(logits, target, self.temperature, mask)

    def _problem(self, logits: Tensor, labels: Tensor | None) -> str | None:
        """The kind of a classification head's problem, as transformers finds it: from the config or the labels."""
        if logits.dim() != 2 or labels is None:
            return None
        if stated := getattr(self.config, "problem_type", None):
            return stated
        if logits.shape[-1] == 1:
            return "regression"
        is_multi_label = labels.is_floating_point() and labels.shape == logits.shape
        return "multi_label_classification" if is_multi_label else None


def _without_adapter(model: nn.Module) -> nn.Module:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _class_order(student: nn.Module, teacher: nn.Module) -> Tensor | None:  # -> (classes,)
    """The numbers that the student's classes have in the teacher; None if they are the same."""
    own, others = (class_names(getattr(model, "config", None)) for model in (student, teacher))
    if not own or not others or own == others or len(own) == len(others) == 1:
        return None
    require(
        sorted(own) == sorted(others) and len({*own}) == len(own),
        "teacher and student must have the same classes, by their names",
        received=f"{', '.join(others[:5])} ({len(others)}) of the teacher, {', '.join(own[:5])} ({len(own)}) of the "
        "student",
        remedy="Set id2label and label2id of both configs to the names of the data's classes.",
        error=ConfigError,
    )
    return torch.tensor([others.index(name) for name in own])
