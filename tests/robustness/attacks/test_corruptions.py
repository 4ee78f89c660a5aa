"""Corruptions against their definitions in NumPy, at every size, and what they may depend on."""

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hf_condlr.errors import AttackError
from hf_condlr.robustness.attacks import Corruption
from hf_condlr.robustness.attacks.corruptions import KINDS

NOISES = ("gaussian_noise", "shot_noise", "impulse_noise")
SHAPES = [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 32, 32), (3, 40, 33), (3, 224, 224), (1, 2, 1)]
each_kind = pytest.mark.parametrize("kind", KINDS)


def pictures(n, shape, seed=0):
    """Smooth images with edges and texture, exact in 8 bits, with some pixels at 0 and at 1."""
    _, height, width = shape
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width] / max(height, width, 2)
    images = np.empty((n, *shape))
    for image in images:
        for channel in image:
            phase, angle, frequency = generator.random(3) * (6, 3, 12) + (0, 0, 6)
            wave = np.sin(frequency * (np.cos(angle) * rows + np.sin(angle) * columns) + phase)
            channel[:] = 0.5 + 0.4 * wave + 0.3 * (rows > generator.random()) + 0.05 * generator.normal(size=rows.shape)
    return torch.from_numpy(np.round(images.clip(0, 1) * 255) / 255).float()


def corrupt(kind, severity, images, **options):
    return Corruption(kind, severity, **options)(nn.Identity(), images, torch.zeros(len(images), dtype=torch.long))


# -------------------------------------------------------------------------------------------------- what holds


@each_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_of_every_size_stay_images(kind, shape):
    images = pictures(2, shape)
    for severity in range(6):
        corrupted = corrupt(kind, severity, images)
        assert corrupted.shape == images.shape and corrupted.dtype == torch.float32
        assert corrupted.isfinite().all() and corrupted.min() >= 0 and corrupted.max() <= 1
        assert severity or torch.equal(corrupted, images)


@each_kind
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if min(shape[1:]) >= 8], ids=str)
def test_severities_grow(kind, shape):
    images = pictures(8, shape)
    change = [(corrupt(kind, severity, images) - images).square().mean().item() for severity in range(6)]
    assert all(more > less * 1.02 for less, more in itertools.pairwise(change)), change


@each_kind
def test_a_sample_meets_the_same_noise_in_every_batch(kind):
    images, attack = pictures(6, (3, 9, 7)), Corruption(kind, 3)
    corrupted = corrupt(kind, 3, images)
    assert torch.equal(corrupt(kind, 3, images[[4]]), corrupted[[4]])
    assert torch.equal(corrupt(kind, 3, images.flip(0)).flip(0), corrupted)
    assert torch.equal(corrupt(kind, 3, images.contiguous(memory_format=torch.channels_last)), corrupted)
    assert torch.equal(corrupt(kind, 3, images.double()).float(), corrupted)
    assert attack.reseeded(5) == attack
    other = corrupt(kind, 3, images, seed=1)
    assert torch.equal(other, corrupted) != (kind in NOISES)


@pytest.mark.parametrize("kind", NOISES)
def test_samples_do_not_share_their_noise(kind):
    images = 0.5 + 0.001 * torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 1, 16, 16)
    change = (corrupt(kind, 5, images) - images).flatten(1)
    assert torch.corrcoef(change).fill_diagonal_(0).abs().max() < 0.35  # 256 values: a deviation of 0.06


@each_kind
def test_states_and_inputs_are_left_as_they_were(kind):
    images = pictures(2, (3, 8, 8))
    before, state = images.clone(), torch.get_rng_state()
    corrupt(kind, 4, images)
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)


# --------------------------------------------------------------------------------------------------- definitions


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_noises_have_their_moments(severity):
    image = torch.full((1, 3, 200, 200), 0.5)
    deviation = KINDS["gaussian_noise"][1][severity - 1]
    noise = (corrupt("gaussian_noise", severity, image) - image).numpy()
    expected = np.random.default_rng(0).normal(size=400_000) * deviation
    assert noise.std() == pytest.approx(expected.clip(-0.5, 0.5).std(), rel=0.02)
    assert abs(noise.mean()) < 0.003
    photons = KINDS["shot_noise"][1][severity - 1]
    values = corrupt("shot_noise", severity, image).numpy() * photons
    assert np.abs(values - values.round()).max() < 1e-3
    drawn = np.random.default_rng(0).poisson(0.5 * photons, 400_000).clip(0, photons)
    assert values.mean() == pytest.approx(drawn.mean(), rel=0.01)
    assert values.var() == pytest.approx(drawn.var(), rel=0.03)
    share = KINDS["impulse_noise"][1][severity - 1]
    values = corrupt("impulse_noise", severity, image)
    assert (values == 0).float().mean().item() == pytest.approx(share / 2, rel=0.1)
    assert (values == 1).float().mean().item() == pytest.approx(share / 2, rel=0.1)
    assert ((values == 0) | (values == 1) | (values == 0.5)).all()


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize(("side", "scale"), [(15, 1.0), (33, 33 / 32), (96, 3.0)])
def test_blurs_spread_a_point_as_their_kernel_says(severity, side, scale):
    """A white pixel in the middle of black ones becomes the kernel."""
    point = torch.zeros(1, 1, side, side)
    middle = side // 2
    point[..., middle, middle] = 1
    rows, columns = np.mgrid[:side, :side] - middle
    distance = np.hypot(rows, columns)
    sigma = scale * KINDS["gaussian_blur"][1][severity - 1]
    gaussian = np.exp(-(distance**2) / (2 * sigma**2))
    blurred = corrupt("gaussian_blur", severity, point)[0, 0].numpy()
    np.testing.assert_allclose(blurred, gaussian / gaussian.sum(), atol=0.012)  # the kernel ends after 3σ
    radius = scale * KINDS["defocus_blur"][1][severity - 1]
    disk = (radius + 0.5 - distance).clip(0, 1)
    blurred = corrupt("defocus_blur", severity, point)[0, 0].numpy()
    np.testing.assert_allclose(blurred, disk / disk.sum(), atol=1e-6)


@pytest.mark.parametrize("kind", ["gaussian_blur", "defocus_blur"])
def test_blurs_leave_an_even_image_and_the_order_of_channels(kind):
    even = torch.tensor([0.2, 0.5, 0.9]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)
    torch.testing.assert_close(corrupt(kind, 5, even), even.contiguous())


@pytest.mark.parametrize("severity", range(1, 6))
def test_brightness_and_contrast(severity):
    images = pictures(3, (3, 8, 8)).double().numpy()
    shift = KINDS["brightness"][1][severity - 1]
    value = images.max(1, keepdims=True)
    raised = np.minimum(value + shift, 1)
    expected = np.where(value > 0, images * raised / np.where(value > 0, value, 1), raised)
    found = corrupt("brightness", severity, torch.from_numpy(images).float()).double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)
    factor = KINDS["contrast"][1][severity - 1]
    mean = images.mean((2, 3), keepdims=True)
    found = corrupt("contrast", severity, torch.from_numpy(images).float()).double().numpy()
    np.testing.assert_allclose(found, (mean + factor * (images - mean)).clip(0, 1), atol=1e-6)


def test_brightness_of_one_channel_is_a_shift():
    images = torch.tensor([0.0, 0.25, 0.7, 1.0]).reshape(1, 1, 2, 2)
    shift = KINDS["brightness"][1][0]
    torch.testing.assert_close(corrupt("brightness", 1, images), (images + shift).clamp(max=1))


@pytest.mark.parametrize(("height", "width"), [(20, 20), (9, 11)])
def test_pixelate_averages_blocks(height, width):
    """Of m blocks, block i has the rows whose middle lies in [i H/m, (i + 1) H/m)."""
    images = pictures(2, (3, height, width)).double().numpy()
    expected = np.empty_like(images)
    count = [round(KINDS["pixelate"][1][4] * side) for side in (height, width)]
    rows, columns = (
        ((np.arange(side) + 0.5) * m / side).astype(int) for side, m in zip((height, width), count, strict=True)
    )
    for i, j in np.ndindex(*count):
        block = np.ix_(range(2), range(3), rows == i, columns == j)
        expected[block] = images[block].mean((2, 3), keepdims=True)
    found = corrupt("pixelate", 5, torch.from_numpy(images).float()).double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_is_pillow_in_this_quality(channels):
    image = pictures(1, (channels, 24, 16))
    pixels = (255 * image[0]).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    picture = Image.fromarray(pixels if channels == 3 else pixels[:, :, 0])
    picture.save(file, format="JPEG", quality=KINDS["jpeg"][1][2])
    expected = np.asarray(Image.open(file)).reshape(24, 16, channels).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(corrupt("jpeg", 3, image)[0].numpy(), expected, atol=1e-6)


# ---------------------------------------------------------------------------------------- parameters and errors


@each_kind
def test_severity_is_the_budget(kind):
    attack = Corruption(kind, 2)
    assert (attack.name, attack.threat, attack.epsilon) == (kind, f"corruption-{kind}", 2)
    assert attack.with_epsilon(4.0) == Corruption(kind, 4) == Corruption(kind, epsilon=4)
    assert not attack.adversarial and attack.distance(nn.Identity(), torch.zeros(1), torch.zeros(1)) is None


def test_errors():
    with pytest.raises(AttackError, match=r"kind must be gaussian_noise, .* or jpeg; received 'fog'"):
        Corruption("fog", 1)
    for severity in (6, -1, 2.5, float("nan")):
        with pytest.raises(AttackError, match=f"severity must be a whole number from 0 to 5; received {severity}"):
            Corruption("jpeg", severity)
    labels = torch.zeros(1, dtype=torch.long)
    for shape, message in (
        ((1, 2, 8, 8), "one or three channels; received 2"),
        ((1, 8, 8), "images .*; received .1, "),
    ):
        with pytest.raises(AttackError, match=message):
            Corruption("jpeg", 1)(nn.Identity(), torch.rand(shape), labels)
    with pytest.raises(AttackError, match=r"inputs must be pixels of \[0, 1\]"):
        Corruption("jpeg", 1)(nn.Identity(), torch.full((1, 1, 8, 8), 1.5), labels)
