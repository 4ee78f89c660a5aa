"""The network of the published experiment on MNIST, and the attacks that it meets."""

import torch.nn.functional as F
from torch import Tensor, nn

from hf_condlr.robustness.attacks import FGSM, PGD, Attack

LAST_LAYER = "fc2"
"""It keeps its full rank, and is conditioned like the others."""

# FGSM at the published budgets. PGD with two losses, because the cross entropy of large logits hides what the margin
# finds.
ATTACKS: tuple[Attack, ...] = (
    *(FGSM(epsilon) for epsilon in (0.01, 0.02, 0.03, 0.04, 0.05, 0.06)),
    *(PGD(epsilon, "linf", steps=10, loss=loss) for loss in ("ce", "margin") for epsilon in (0.03, 0.06, 0.1)),
)


class LeNet5(nn.Module):
    """Caffe's variant of LeNet5, for grey 28×28 images: 431,080 parameters.

    20 and 50 filters 5×5, each followed by 2×2 max pooling, 500 hidden units, 10 logits, leaky ReLU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, 28, 28) -> (B, 10)
        # Pooling before the activation, which is increasing, computes the same on a quarter of the data.
        x = F.leaky_relu(F.max_pool2d(self.conv1(x), 2))
        x = F.leaky_relu(F.max_pool2d(self.conv2(x), 2)).flatten(1)
        return self.fc2(F.leaky_relu(self.fc1(x)))
