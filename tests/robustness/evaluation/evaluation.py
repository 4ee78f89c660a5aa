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


SOUND = [PGD(k / 255, steps=20) for k in (4, 16, 32)]


NAMES = (
    "every sample counted once",
    "examples within the ball and the bounds",
    "robust accuracy falls with ε",
    "examples hold as 8-bit images",
    "logits are repeatable",
    "outputs are logits",
    "pixels are spread as the processor expects",
    "float32 in the attack",
    "the attacked model is the model",
    "no change at ε = 0",
    "gradients are not zero",
    "no weaker than one step",
    "converged",
    "margin loss finds no more",
    "no gradient masking",
    "nothing survives a huge ε",
)


def checked(model, attacks=SOUND, dataset=None, **options):
    report = evaluate_robustness(
        model, dataset or classifiers.Pairs(), attacks, progress=False, **{"check_samples": 96} | options
    )
    return report, {next(name for name in NAMES if check.name.startswith(name)): check for check in report.checks}


def fails(checks):
    return {name for name, check in checks.items() if check.passed is False}
