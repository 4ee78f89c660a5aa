"""Losses that combine: distillation, adversarial training and TRADES with any loss of the user's."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    TrainingArguments,
)

from hf_condlr import CondLRTrainer
from hf_condlr.errors import ConfigError
from hf_condlr.training import distillation_loss
from tests.training.test_accumulation import focal, gpt2, numbers, t5, token_data, vectors, vit
from tests.training.tiny import NO_DROPOUT, SIZES, arguments, convert, dense_bert, dense_vit, image_data, text_data


def token_bert():
    return BertForTokenClassification(BertConfig(vocab_size=40, num_labels=5, **SIZES, **NO_DROPOUT))


def question_bert():
    return BertForQuestionAnswering(BertConfig(vocab_size=40, **SIZES, **NO_DROPOUT))


def bart():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40, "dropout": 0.0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads))


def tags(count=48):
    return [row | {"labels": torch.where(row["labels"] < 0, -100, row["labels"] % 5)} for row in token_data(count)]


def questions(count=48):
    position = lambda: int(torch.randint(0, 7, ()))  # noqa: E731
    return [
        {"input_ids": torch.randint(0, 40, (7,)), "start_positions": position(), "end_positions": position()}
        for _ in range(count)
    ]


def kl(p, q):
    """Mean over samples or tokens of Σ p log(p/q)."""
    return (p * (p / q).log()).sum(-1).mean()


def probabilities(logits, T):
    return (logits / T).softmax(-1)


def single(z, t, labels, T):
    return T**2 * kl(probabilities(t, T), probabilities(z, T))


def multi(z, t, labels, T):
    p, q = (t / T).sigmoid(), (z / T).sigmoid()
    return T**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()


def tokens(z, t, labels, T):
    kept = labels != -100
    return T**2 * kl(probabilities(t[kept], T), probabilities(z[kept], T))


def next_tokens(z, t, labels, T):
    return tokens(z[:, :-1], t[:, :-1], labels[:, 1:], T)


TASKS = {
    "single label": (dense_vit, image_data, single),
    "multi-label": (lambda: vit("multi_label_classification"), lambda n=48: vectors(image_data(n)), multi),
    "regression": (lambda: vit("regression"), lambda n=48: numbers(image_data(n)), lambda z, t, y, T: F.mse_loss(z, t)),
    "token classification": (token_bert, tags, tokens),
    "causal": (gpt2, token_data, next_tokens),
    "T5": (t5, token_data, tokens),
    "BART": (bart, token_data, tokens),
}
TRAINED = TASKS | {"question answering": (question_bert, questions, None)}


def with_noise(model):
    """Random weights of transformers are so small that outputs hardly differ."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def taught(folder, student, teacher, rows, cls=CondLRTrainer, weight=1.0, **options):
    own = {name: options.pop(name) for name in ("compute_loss_func", "processing_class") if name in options}
    args = arguments(folder, distillation_weight=weight, **options)
    return cls(model=student, args=args, train_dataset=rows, teacher=teacher, **own)


@pytest.mark.parametrize("task", TASKS)
def test_distillation_is_the_formula_of_the_task(task, tmp_path):
    build, data, formula = TASKS[task]
    teacher, rows = with_noise(build()), data(8)
    student = convert(build()).train()
    trainer = taught(tmp_path, student, teacher, rows, distillation_temperature=3.0)
    inputs = trainer.data_collator(rows)
    loss = trainer.compute_loss(student, dict(inputs))
    with torch.no_grad():
        z, t = student(**inputs).logits.double(), teacher.eval()(**inputs).logits.double()
    expected = formula(z, t, inputs["labels"], 3.0).item()
    assert expected > 1e-5
    assert loss.item() == pytest.approx(expected, rel=1e-3)


def test_the_starts_and_ends_of_answers_are_learnt(tmp_path):
    teacher, student = question_bert(), convert(question_bert()).train()
    trainer = taught(tmp_path, student, teacher, questions(), distillation_temperature=1.0)
    inputs = trainer.data_collator(questions(8))
    loss = trainer.compute_loss(student, dict(inputs))
    with torch.no_grad():
        z, t = student(**inputs), teacher.eval()(**inputs)
    pairs = ((getattr(z, name), getattr(t, name)) for name in ("start_logits", "end_logits"))
    expected = torch.stack([kl(b.softmax(-1), a.softmax(-1)) for a, b in pairs]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("task", TRAINED)
def test_with_a_weight_of_one_every_task_trains(task, tmp_path):
    """Towards the teacher, whatever the labels say; and the term of a model with itself is 0."""
    build, data, _ = TRAINED[task]
    teacher, rows = with_noise(build()), data()
    trainer = taught(tmp_path, convert(build()), teacher, rows, learning_rate=1e-2)
    inputs = trainer.data_collator(rows)
    model = trainer.model.train()
    first = trainer.compute_loss(model, dict(inputs)).item()
    trainer.train()
    last = trainer.compute_loss(model.train(), dict(inputs)).item()
    assert 0 < last < 0.9 * first
    same = taught(tmp_path, copy.deepcopy(teacher).train(), teacher, rows)
    assert abs(same.compute_loss(same.model, dict(inputs)).item()) < 1e-7


def named(model, *names):
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: i for i, name in enumerate(names)}
    return model


def test_classes_are_matched_by_their_names(tmp_path):
    teacher = named(with_noise(dense_bert(num_labels=3)), "c", "a", "b")
    student = named(dense_bert(num_labels=3), "a", "b", "c")
    trainer = taught(tmp_path, convert(student).train(), teacher, text_data(8), distillation_temperature=1.0)
    inputs = trainer.data_collator(text_data(8))
    loss = trainer.compute_loss(student, dict(inputs))
    ids = inputs["input_ids"]
    with torch.no_grad():
        p, q = teacher.eval()(ids).logits[:, [1, 2, 0]].softmax(-1), student(ids).logits.softmax(-1)
    assert loss.item() == pytest.approx(kl(p, q).item(), rel=1e-4)


@pytest.mark.parametrize(
    "names, message",
    [
        (("a", "b", "d"), r"the same classes, by their names; received a, b, d \(3\) of the teacher, a, b, c \(3\)"),
        (("a", "b"), r"the same classes, by their names; received a, b \(2\) of the teacher"),
    ],
)
def test_other_classes_are_refused(names, message, tmp_path):
    teacher = named(dense_bert(num_labels=len(names)), *names)
    student = convert(named(dense_bert(num_labels=3), "a", "b", "c"))
    with pytest.raises(ConfigError, match=message):
        taught(tmp_path, student, teacher, text_data(8))


def test_another_vocabulary_is_refused(tmp_path):
    teacher = gpt2()
    teacher.resize_token_embeddings(44)
    trainer = taught(tmp_path, convert(gpt2()).train(), teacher, token_data(8))
    inputs = trainer.data_collator(token_data(8))
    with pytest.raises(ConfigError, match=r"logits of the same shape; received \(8, 7, 44\) of the teacher"):
        trainer.compute_loss(trainer.model, dict(inputs))


def test_a_teacher_without_arguments_for_it_is_refused(tmp_path):
    args = arguments(tmp_path, TrainingArguments)
    with pytest.raises(ConfigError, match=r"belong together; received a teacher.*CondLRTrainingArguments"):
        CondLRTrainer(model=convert(dense_bert()), args=args, teacher=dense_bert())


# ------------------------------------------------------------------------------------------- losses of the user's own


class OwnLoss(CondLRTrainer):
    """Calls no other compute_loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = 7 * F.cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss


def sevenfold(outputs, labels, num_items_in_batch=None):
    return 7 * F.cross_entropy(outputs["logits"], labels)


def smoothed(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.2)


LOSSES = {
    "compute_loss": (OwnLoss, {}, lambda z, y: 7 * F.cross_entropy(z, y)),
    "compute_loss_func": (CondLRTrainer, {"compute_loss_func": sevenfold}, lambda z, y: 7 * F.cross_entropy(z, y)),
    "focal loss": (CondLRTrainer, {"compute_loss_func": focal}, lambda z, y: focal({"logits": z}, y)),
    "label smoothing": (CondLRTrainer, {"label_smoothing_factor": 0.2}, smoothed),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_distillation_is_added_to_any_loss(loss, tmp_path):
    cls, options, formula = LOSSES[loss]
    teacher, student, rows = dense_bert(), convert(dense_bert()).train(), text_data(8)
    trainer = taught(tmp_path, student, teacher, rows, cls, weight=0.25, distillation_temperature=2.0, **options)
    inputs = trainer.data_collator(rows)
    found = trainer.compute_loss(student, dict(inputs))
    with torch.no_grad():
        z, t = student(inputs["input_ids"]).logits, teacher.eval()(inputs["input_ids"]).logits
    expected = 0.75 * formula(z, inputs["labels"]) + 0.25 * distillation_loss(z, t, 2.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("trades", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_adversarial_samples_are_trained_on_with_any_loss(loss, trades, tmp_path):
    """With TRADES the loss is that of the clean samples, all of whose labels are classes."""
    cls, options, formula = LOSSES[loss]
    student, rows = convert(dense_bert()).train(), text_data(8)
    own = {"compute_loss_func": options["compute_loss_func"]} if "compute_loss_func" in options else {}
    options = {name: value for name, value in options.items() if name not in own}
    attack = {"adversarial_attack": "pgd", "adversarial_epsilon": 0.3, "adversarial_schedule": "constant"}
    args = arguments(tmp_path, trades_beta=2.0 if trades else 0.0, **attack, **options)
    trainer = cls(model=student, args=args, train_dataset=rows, **own)
    trainer.state.max_steps = 10
    inputs = trainer.data_collator(rows)
    found = trainer.compute_loss(student, dict(inputs))
    with torch.no_grad(), trainer.combined_loss.adversary.batch(student, inputs, draw=(0, 0, 0)) as batch:
        z = student(**{name: value for name, value in batch.inputs.items() if name != "labels"}).logits
        expected = formula(z, inputs["labels"]) + batch.regularizer(z)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert (batch.regularizer is not None) and (batch.perturbed_logits is not None) is trades
    trainer.train()


def test_batch_norm_sees_clean_and_perturbed_samples_apart():
    """TRADES takes two forward passes, as its authors do: the statistics of clean batches stay those of clean ones."""
    from hf_condlr import AdversarialArguments, AdversarialTraining

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.sizes = nn.BatchNorm2d(1), []
            self.head = nn.Linear(64, 2)

        def forward(self, pixel_values, labels=None):
            if self.training:
                self.sizes.append(len(pixel_values))
            return {"logits": self.head(self.norm(pixel_values).flatten(1))}

    options = {"adversarial_attack": "pgd", "adversarial_epsilon": 0.1, "trades_beta": 1.0}
    adversary = AdversarialTraining(
        AdversarialArguments(adversarial_image_mean=[0.0], adversarial_image_std=[1.0], **options)
    )
    model, inputs = Net().train(), {"pixel_values": torch.rand(4, 1, 8, 8), "labels": torch.tensor([0, 1, 1, 0])}
    with adversary.batch(model, inputs) as batch:
        logits = model(**batch.inputs)["logits"]
        (F.cross_entropy(logits, inputs["labels"]) + batch.regularizer(logits)).backward()
    assert model.sizes == [4, 4]
    assert model.head.weight.grad.abs().sum() > 0


def test_batches_need_not_be_mappings(tmp_path):
    """Where a compute_loss of the user's takes them."""

    class Pairs(CondLRTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ids, labels = inputs
            return F.cross_entropy(model(ids).logits, labels)

    rows = [(row["input_ids"], row["labels"]) for row in text_data(16)]
    collate = torch.utils.data.default_collate
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    trainer = Pairs(model=convert(dense_bert()), args=args, train_dataset=rows, data_collator=collate)
    trainer.train()
    assert trainer.manifold_step.step_count == 2
