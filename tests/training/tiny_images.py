"""Images and attacks for the tests of adversarial training."""

import torch

from hf_condlr import AdversarialArguments, AdversarialTraining
from tests.models import bert

MEAN, STD = 0.5, 0.25
EPSILON = 1 / 16
"""With pixels of k/256 and this mean and std, all arithmetic on pixels is exact in float32."""
FGSM = {"adversarial_attack": "fgsm", "adversarial_epsilon": EPSILON}
PGD_ = {"adversarial_attack": "pgd", "adversarial_epsilon": EPSILON, "adversarial_steps": 2}
CONSTANT = {"adversarial_schedule": "constant"}


def image_rows(count=48, dtype=torch.float32):
    """Normalised images of 8-bit pixels and labels that a brighter half decides."""
    labels = torch.randint(0, 2, (count,))
    pixels = torch.randint(0, 200, (count, 1, 8, 8)) + 40 * (labels * 2 - 1).view(-1, 1, 1, 1) * torch.eye(8).long()
    values = (pixels.clamp(0, 256) / 256 - MEAN) / STD
    return [{"pixel_values": x.to(dtype), "labels": int(y)} for x, y in zip(values, labels, strict=True)]


def batch_of(rows):
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def rows_with_weak_features(count):
    """A block that moves by 50/256 with nine of ten labels, and all other pixels by 10/256 < ε with each label.

    After Tsipras et al. 2019: together the weak features tell the label better, and an adversary inverts them.
    """
    labels = torch.randint(0, 2, (count,))
    sign = (labels * 2 - 1).view(-1, 1, 1, 1)
    strong = torch.where(torch.rand(count, 1, 1, 1) < 0.9, sign, -sign)
    block = torch.zeros(8, 8, dtype=torch.long)
    block[2:6, 2:6] = 1
    pixels = torch.randint(108, 149, (count, 1, 8, 8)) + 50 * strong * block + 10 * sign * (1 - block)
    values = (pixels / 256 - MEAN) / STD
    return [{"pixel_values": x, "labels": int(y)} for x, y in zip(values, labels, strict=True)]


def adversary(processor=None, seed=0, **options):
    return AdversarialTraining(AdversarialArguments(**options), processor=processor, seed=seed)


def dense_text():
    return bert(num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
