"""The losses that attacks climb, where float32 could mislead."""

import pytest
import torch

from hf_condlr.robustness.attacks.losses import losses


@pytest.mark.parametrize("gap", [1.0, 17.0, 40.0, 80.0])
def test_the_gradient_of_a_confident_models_cross_entropy_has_all_its_parts(gap):
    """In float32 softmax(z)_y − 1 is 0 beyond a gap of 17; only the parts of the other classes would be left."""
    logits = torch.tensor([[gap, 0.0, -0.5]], requires_grad=True)
    labels = torch.zeros(1, dtype=torch.long)
    value = losses(logits, labels, "ce")
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    exact = logits.detach().double().requires_grad_(True)
    others = (exact[:, 1:] - exact[:, :1]).exp().sum()
    expected = torch.log1p(others)
    (reference,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=0)
    torch.testing.assert_close(value.double()[0], expected, rtol=1e-5, atol=1e-7)
