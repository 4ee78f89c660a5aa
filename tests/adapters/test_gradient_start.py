"""`start_from_gradient` against the singular vectors of the weight's gradient, in float64 by NumPy."""

import logging

import numpy as np
import pytest
import torch

from hf_condlr import start_from_gradient
from hf_condlr.errors import ConversionError
from tests.adapters.tiny import ARCHITECTURES, adapted, assert_within_bounds, base, loss_of, outputs, trained
from tests.models import MODELS


def weight_gradients(name, batches):
    """{layer: ∇L(W₀) (m, n)} of the base model itself."""
    model = base(name).double()
    for inputs in batches:
        loss_of(model, inputs).backward()
    return {
        key.removesuffix(".weight"): p.grad.numpy().T if name == "gpt2" else p.grad.numpy()
        for key, p in model.named_parameters()
        if p.ndim == 2 and p.grad is not None
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_bases_are_the_leading_singular_vectors(name):
    """The projections on the spans agree, and −U U'ᵀ∇L V V'ᵀ is what S grows by; measured: 1e-6,
    since the randomized SVD finds the larger ones of 2r + 8 singular vectors."""
    model, inputs = adapted(base(name).double(), r=2), MODELS[name].inputs()
    plain = outputs(model, name)
    shares = start_from_gradient(model, lambda: loss_of(model, inputs).backward())
    gradients = weight_gradients(name, [inputs])
    assert shares
    for key, share in shares.items():
        update = model.get_submodule(key).condlr_factors["default"]
        U, V = update.U.detach().numpy(), update.V.detach().numpy()
        G = gradients[key.removeprefix("base_model.model.")]
        P, sigma, Qh = np.linalg.svd(G)
        if sigma[1] - sigma[2] < 1e-3 * sigma[0]:
            continue  # no leading pair
        np.testing.assert_allclose(U @ U.T, P[:, :2] @ P[:, :2].T, atol=1e-4)
        np.testing.assert_allclose(V @ V.T, Qh[:2].T @ Qh[:2], atol=1e-4)
        np.testing.assert_allclose(-U.T @ G @ V, np.diag(sigma[:2]), atol=1e-4 * sigma[0])
        assert share == pytest.approx((sigma[:2] ** 2).sum() / (sigma**2).sum())
    assert (outputs(model, name) - plain).abs().max() < 1e-9
    assert all(p.grad is None for p in model.parameters())
    assert_within_bounds(model)


def test_several_batches_are_added_up():
    """Carried on are more directions than these layers have."""
    model = adapted(base().double(), r=4, target_modules=["k_proj"])
    torch.manual_seed(1)
    batches = [MODELS["llama"].inputs() for _ in range(3)]
    start_from_gradient(model, lambda: [loss_of(model, inputs).backward() for inputs in batches])
    for key, G in weight_gradients("llama", batches).items():
        if key.endswith("k_proj"):
            update = model.base_model.model.get_submodule(key).condlr_factors["default"]
            U, V = update.U.detach().numpy(), update.V.detach().numpy()
            np.testing.assert_allclose(-U.T @ G @ V, np.diag(np.linalg.svd(G)[1][:4]), atol=1e-8)


def test_the_first_steps_go_down_faster():
    inputs, losses = MODELS["llama"].inputs(), {}
    for start in ("random", "gradient"):
        torch.manual_seed(0)
        model = adapted(r=1)
        if start == "gradient":
            start_from_gradient(model, lambda model=model: loss_of(model, inputs).backward())
        losses[start] = loss_of(trained(model, steps=3, lr=1e-3), inputs).item()
    assert losses["gradient"] < losses["random"]


def test_gradient_checkpointing_counts_once():
    starts = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adapted(base().double()).train()
        inputs = MODELS["llama"].inputs()
        if checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": False})
        starts.append(start_from_gradient(model, lambda model=model, x=inputs: loss_of(model, x).backward()))
    assert starts[0] == pytest.approx(starts[1])


def test_a_step_without_backward_is_refused():
    model = adapted()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ConversionError, match=r"must call backward\(\).*received no gradient"):
        start_from_gradient(model, lambda: loss_of(model, MODELS["llama"].inputs()))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_gradient_that_is_not_finite_is_refused():
    model = adapted()
    with pytest.raises(ConversionError, match=r"received NaN or inf in .*q_proj"):
        start_from_gradient(model, lambda: (float("nan") * loss_of(model, MODELS["llama"].inputs())).backward())


def test_layers_without_a_gradient_are_logged(caplog):
    model, inputs = adapted(base("bert")), MODELS["bert"].inputs()
    with caplog.at_level(logging.WARNING, logger="hf_condlr"):
        start_from_gradient(model, lambda: model(**inputs, output_hidden_states=True).hidden_states[1].sum().backward())
    assert "no gradient reached base_model.model.bert.encoder.layer.1" in caplog.text
