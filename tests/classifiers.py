"""Small trained classifiers of real digits, and the digits, for tests of attacks and evaluations."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture
from sklearn.datasets import load_digits
from torch import nn
from transformers import ViTImageProcessorPil

from hf_condlr.robustness.attacks import PixelModel

MEAN, STD = 0.3, 0.35


def digits():
    """1,797 digits: pixels (N, 1, 8, 8) that are exact in 8 bits, and labels (N,)."""
    return tuple(values.clone() for values in _digits())  # else a test could change them for the others


@functools.cache
def _digits():
    pixels, labels = load_digits(return_X_y=True)
    pixels = np.round(pixels.reshape(-1, 1, 8, 8) * 255 / 16) / 255
    return torch.from_numpy(pixels).float(), torch.from_numpy(labels)


def held_out(n=200):
    """The last n, which no model of this module was trained on."""
    pixels, labels = digits()
    return pixels[-n:], labels[-n:]


class Pairs(torch.utils.data.Dataset):
    """(pixels, label)."""

    def __init__(self, n=200):
        self.pixels, self.labels = held_out(n)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.pixels[i], self.labels[i]


def images(n=200, label="label"):
    """The same as a data set of images."""
    pixels, labels = held_out(n)
    pictures = [Picture.fromarray((255 * x[0]).round().byte().numpy()) for x in pixels]
    features = Features({"image": Image(), label: ClassLabel(num_classes=10)})
    return Dataset.from_dict({"image": pictures, label: labels.tolist()}, features=features)


def processor(**options):
    """The image processor that belongs to `mlp()`."""
    return ViTImageProcessorPil(**{"do_resize": False, "image_mean": [MEAN], "image_std": [STD], **options})


class MLP(nn.Module):
    """Logits of normalised digits, as keyword or positional argument like models of transformers."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
        self.scale = scale
        self.config = type("Config", (), {"num_channels": 1, "_name_or_path": "digits-mlp"})()

    def forward(self, pixel_values):
        return self.scale * self.layers(pixel_values)


@functools.cache
def _trained_state():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, (pixels, labels) = MLP(), digits()
        x, y = (pixels[:-300] - MEAN) / STD, labels[:-300]
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(30):
            for index in torch.randperm(len(y)).split(128):
                optimizer.zero_grad()
                F.cross_entropy(model(x[index]), y[index]).backward()
                optimizer.step()
    return model.state_dict()


def mlp(scale=1.0):
    """A trained model of normalised digits, in training mode: 97 % of the test digits."""
    model = MLP(scale)
    model.load_state_dict(_trained_state())
    return model


def pixel_mlp(scale=1.0):
    """The same on pixels."""
    return PixelModel(mlp(scale), MEAN, STD)
