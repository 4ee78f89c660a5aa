"""The published experiments: network, images, and the attacks that the test split meets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from networks import VGG16, LeNet5, WideResNet16x4
from torch import nn

from hf_condlr.robustness.attacks import FGSM, PGD, Attack


@dataclass(frozen=True)
class Experiment:
    """What the experiments differ in."""

    network: Callable[[], nn.Module]
    dataset: str
    """Name of its folder."""
    last_layer: str
    """Keeps its full rank, and is conditioned like the others."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of the training pixels in [0, 1], for each channel."""
    momentum: float
    learning_rates: tuple[float, ...]
    """The sweep; the published rate is among them."""
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
CIFAR10 = {"dataset": "cifar10", "mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
CIFAR100 = {"dataset": "cifar100", "mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}
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
        mean=(0.1307,),
        std=(0.3081,),
        momentum=0.3,
        learning_rates=(0.05, 0.1, 0.2, 0.4),
        augment=False,
        attacks=MNIST_ATTACKS,
    ),
    "vgg16_cifar10": Experiment(network=VGG16, **CIFAR10, **CIFAR),
    "wrn16_4_cifar10": Experiment(network=WideResNet16x4, **CIFAR10, **CIFAR),
    "wrn16_4_cifar100": Experiment(network=partial(WideResNet16x4, classes=100), **CIFAR100, **CIFAR),
}
