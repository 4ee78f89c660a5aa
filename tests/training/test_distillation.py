"""Distillation: the formula, and what it does to a student; the forms of all tasks are in test_losses.py."""

import copy

import pytest
import torch
from torch import nn

from hf_condlr import CondLRTrainer
from hf_condlr.errors import ConfigError
from hf_condlr.training import distillation_loss
from tests.training.tiny import arguments, convert, dense_bert, text_data


def test_distillation_loss_is_the_formula():
    z, t, T = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64), 3.0
    p, q = (t / T).softmax(-1), (z / T).softmax(-1)
    expected = T**2 * (p * (p.log() - q.log())).sum(-1)
    assert distillation_loss(z, t, T).item() == pytest.approx(expected.mean().item(), rel=1e-5)
    mask = torch.tensor([1, 0, 1, 1, 0, 0])
    assert distillation_loss(z, t, T, mask).item() == pytest.approx(expected[mask.bool()].mean().item(), rel=1e-5)


def test_distillation_pulls_the_student_to_the_teacher(tmp_path):
    teacher, rows = dense_bert(), text_data()
    with torch.no_grad():
        teacher.classifier.weight.mul_(30)
    distances = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        student = convert(copy.deepcopy(teacher), rank_ratio=0.1)
        args = arguments(tmp_path, num_train_epochs=6, distillation_weight=weight)
        trainer = CondLRTrainer(model=student, args=args, train_dataset=rows, teacher=teacher if weight else None)
        trainer.train()
        ids = torch.stack([row["input_ids"] for row in rows])
        with torch.no_grad():
            pairs = student.eval()(input_ids=ids).logits, teacher.eval()(input_ids=ids).logits
        distances[weight] = (pairs[0].softmax(-1) - pairs[1].softmax(-1)).abs().mean().item()
    assert distances[1.0] < 0.7 * distances[0.0]


def test_evaluation_loss_is_the_plain_one(tmp_path):
    teacher, rows = dense_bert(), text_data(8)
    args = arguments(tmp_path, distillation_weight=0.9)
    student = convert(copy.deepcopy(teacher))
    trainer = CondLRTrainer(model=student, args=args, train_dataset=rows, eval_dataset=rows, teacher=teacher)
    ids, labels = torch.stack([r["input_ids"] for r in rows]), torch.tensor([r["labels"] for r in rows])
    with torch.no_grad():
        expected = nn.functional.cross_entropy(student.eval()(input_ids=ids).logits, labels)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_teacher_and_weight_belong_together(weight, tmp_path):
    teacher = dense_bert() if weight == 0 else None
    with pytest.raises(ConfigError, match="a teacher and distillation_weight > 0 belong together"):
        CondLRTrainer(
            model=convert(dense_bert()), args=arguments(tmp_path, distillation_weight=weight), teacher=teacher
        )
