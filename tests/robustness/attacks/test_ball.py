"""Random points of the balls."""

import torch

from hf_condlr.robustness.attacks import FGSM, PGD
from tests.robustness.attacks.problems import EPSILON, Flat


def test_random_starts_are_uniform_in_the_ball():
    """Where all gradients vanish, the result is the random start."""
    x, labels = torch.full((4000, 2, 3), 0.5), torch.zeros(4000, dtype=torch.long)
    start = PGD(EPSILON)(Flat(), x, labels)
    delta = ((start - x) / EPSILON).flatten()
    assert delta.abs().max() <= 1 + 1e-5
    counts = torch.histc(delta, bins=10, min=-1, max=1) / len(delta)
    torch.testing.assert_close(counts, torch.full((10,), 0.1), rtol=0, atol=0.01)
    start = PGD(EPSILON, "l2")(Flat(), x, labels)
    delta = ((start - x) / EPSILON).flatten(1)
    assert delta.norm(dim=1).max() <= 1 + 1e-5
    counts = torch.histc(delta.norm(dim=1) ** 6, bins=10, min=0, max=1) / len(
        delta
    )  # radius⁶ is uniform in 6 dimensions
    torch.testing.assert_close(counts, torch.full((10,), 0.1), rtol=0, atol=0.03)
    assert delta.mean(0).abs().max() < 0.05
    assert torch.equal(FGSM(EPSILON)(Flat(), x, labels), x)
