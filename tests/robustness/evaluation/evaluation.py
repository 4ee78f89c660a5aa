"""What the tests of evaluations share."""

from datasets import Dataset

from hf_condlr import evaluate_robustness
from hf_condlr.robustness.attacks import FGSM, PGD, CharacterAttack, EmbeddingPGD
from tests import classifiers, text_models

ATTACKS = [FGSM(0.1), PGD(0.1, steps=5), PGD(0.1, steps=5, loss="margin"), PGD(0.5, "l2", steps=5)]


TEXT_ATTACKS = [EmbeddingPGD(0.3, steps=5), EmbeddingPGD(0.6, steps=5), CharacterAttack(0.3)]


def evaluate(model=None, dataset=None, attacks=ATTACKS, **options):
    options = {"batch_size": 48, "checks": False, "progress": False} | options
    model = classifiers.pixel_mlp() if model is None else model
    return evaluate_robustness(model, dataset or classifiers.Pairs(), attacks, **options)


def comparable(report):
    """Everything but times and the number of processes."""
    values = report.to_dict()
    for attack in values["attacks"]:
        del attack["seconds"]
    del values["settings"]["processes"]
    return values


def reviews(number=48):
    texts, labels = text_models.reviews(number, seed=1)
    return Dataset.from_dict({"text": texts, "label": labels.tolist()})
