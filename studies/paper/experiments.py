"""The published experiments: network, images, and the attacks that the test split meets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from hf_condlr.robustness.attacks import FGSM, PGD, Attack
from studies.paper.networks import VGG16, LeNet5, WideResNet16x4


@dataclass(frozen=True)
class Experiment:
    """What the experiments differ in.

    Attributes:
        network: Builds the dense network.
        dataset: Name of the images' folder.
        last_layer: Keeps its full rank, and is conditioned like the others.
        momentum: Of SGD.
        learning_rates: The sweep; the published rate is among them.
        augment: Whether training images are mirrored and shifted.
        attacks: On the test split.
    """

    network: Callable[[], nn.Module]
    dataset: str
    last_layer: str
    momentum: float
    learning_rates: tuple[float, ...]
    augment: bool
    attacks: Sequence[Attack]


# FGSM at the published budgets; on CIFAR the published one leaves [0, 1]: `clip=False`, a threat of its own. PGD with
# two losses, because the cross entropy of large logits hides what the margin finds.
MNIST_ATTACKS = (
    *(FGSM(epsilon) for epsilon in (0.01, 0.02, 0.03, 0.04, 0.05, 0.06)),
    *(PGD(epsilon, "linf", steps=10, loss=loss) for loss in ("ce", "margin") for epsilon in (0.03, 0.06, 0.1)),
)
CIFAR_ATTACKS = (
    *(FGSM(epsilon, clip=False) for epsilon in (0.002, 0.004, 0.006)),
    *(PGD(epsilon, "l2", steps=10, loss=loss) for loss in ("ce", "margin") for epsilon in (0.1, 0.2, 0.3)),
)
CIFAR = {
    "last_layer": "classifier",
    "momentum": 0.45,
    "learning_rates": (0.0125, 0.025, 0.05, 0.1),
    "augment": True,
    "attacks": CIFAR_ATTACKS,
}

EXPERIMENTS = {
    "lenet5_mnist": Experiment(
        network=LeNet5,
        dataset="mnist",
        last_layer="fc2",
        momentum=0.3,
        learning_rates=(0.05, 0.1, 0.2, 0.4),
        augment=False,
        attacks=MNIST_ATTACKS,
    ),
    "vgg16_cifar10": Experiment(network=VGG16, dataset="cifar10", **CIFAR),
    "wrn16_4_cifar10": Experiment(network=WideResNet16x4, dataset="cifar10", **CIFAR),
    "wrn16_4_cifar100": Experiment(network=partial(WideResNet16x4, classes=100), dataset="cifar100", **CIFAR),
}
