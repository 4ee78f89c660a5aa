"""The networks of the method's published experiments (arXiv 2306.01485): logits of normalised images."""

import torch.nn.functional as F
from torch import Tensor, nn

VGG16_CHANNELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


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


class VGG16(nn.Module):
    """13 convolutions 3×3 with batch normalisation and three linear layers of 512, 512 and `classes`, for 32×32 images.

    The form in use for CIFAR: five poolings leave one pixel of 512 channels, so that the linear layers are narrow.
    15,253,578 parameters for 10 classes.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for block in VGG16_CHANNELS:
            for channels in block:
                layers += [nn.Conv2d(width, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
                width = channels
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU())
        self.classifier = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, 32, 32) -> (B, classes)
        return self.classifier(self.hidden(self.features(x).flatten(1)))


class WideResNet16x4(nn.Module):
    """WideResNet of depth 16 and widening factor 4 (arXiv 1605.07146), for 32×32 images, without dropout.

    A 3×3 convolution of 16 channels, three groups of two blocks with 64, 128 and 256 channels, the second and third
    group at half the resolution, mean over the pixels, one linear layer. 2,748,890 parameters for 10 classes.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks = []
        for width, channels, stride in ((16, 64, 1), (64, 128, 2), (128, 256, 2)):
            blocks += [WideBlock(width, channels, stride), WideBlock(channels, channels, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(256)
        self.classifier = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, 32, 32) -> (B, classes)
        return self.classifier(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


class WideBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))); a 1×1 convolution of relu(bn(x)) in place of x where the shape changes."""

    def __init__(self, width: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(width, channels, 3, stride=stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        changes = stride != 1 or width != channels
        self.shortcut = nn.Conv2d(width, channels, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(F.relu(self.norm2(self.conv1(y))))
