"""Second moments of layer inputs, and the start that minimises the error in their metric."""

import copy

import pytest
import torch
from torch import nn

from hf_condlr import CondLRConfig, get_robust_lowrank_model
from hf_condlr.conversion.factorizations import truncation_error
from hf_condlr.conversion.measuring import input_covariances
from hf_condlr.conversion.spectra import activation_aware
from hf_condlr.errors import ConversionError
from tests.conversion.calibration_data import batches, make_bert


def optimum(W, C, r):
    """√(Σ_{i>r} σ_i(W C^{1/2})²) / ‖W C^{1/2}‖_F in float64, with C^{1/2} by its eigenvalues."""
    values, Q = torch.linalg.eigh(C.double())
    sigma = torch.linalg.svdvals(W.double() @ (Q * values.clamp_min(0).sqrt()) @ Q.mT)
    return (sigma[r:].square().sum() / sigma.square().sum()).sqrt().item()


@pytest.mark.parametrize("rank_of_c", [20, 6, 2])
@pytest.mark.parametrize("shape", [(30, 20), (12, 20), (20, 20)])
def test_whitened_error_is_the_optimum_singular_covariances_included(shape, rank_of_c):
    W = torch.randn(shape)
    X = torch.randn(200, rank_of_c) @ torch.randn(rank_of_c, 20) * torch.logspace(0, -2, 20)
    C = X.mT @ X / len(X)
    for r in (1, 4, 9):
        U, S, V = activation_aware(W, r, C)
        assert U.shape == (shape[0], r) and S.shape == (r, r) and V.shape == (20, r)
        torch.testing.assert_close(U.mT @ U, torch.eye(r), rtol=0, atol=1e-5)
        torch.testing.assert_close(V.mT @ V, torch.eye(r), rtol=0, atol=1e-5)
        # Measured: equal to 1e-6. With a C of rank ≤ r both are rounding: C in float32 has eigenvalues of 1e-7 of the
        # largest where it should have 0, and their roots count.
        assert truncation_error(W, U, S, V, C) == pytest.approx(
            optimum(W, C, r), rel=1e-4, abs=torch.finfo().eps ** 0.5
        )


def test_identity_covariance_is_the_plain_svd():
    W = torch.randn(9, 7)
    U, S, V = activation_aware(W, 3, torch.eye(7))
    P, sigma, Qh = torch.linalg.svd(W)
    torch.testing.assert_close(U @ S @ V.mT, P[:, :3] * sigma[:3] @ Qh[:3], rtol=1e-4, atol=1e-5)


def recorded_inputs(model, name, data):
    """The layer's input tokens that are not padding, by a hook and a loop over samples."""
    rows = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda module, args: rows.append(args[0].detach()))
    for batch in data:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    hook.remove()
    masks = [batch["attention_mask"] for batch in data]
    return torch.cat([x[i, : int(m[i].sum())] for x, m in zip(rows, masks, strict=True) for i in range(len(x))])


def test_covariance_leaves_padding_out_and_ignores_dropout():
    model, data = make_bert().train(), batches()
    name = "bert.encoder.layer.1.attention.self.query"
    C = input_covariances(model, [name], data)[name]
    assert model.training
    X = recorded_inputs(model.eval(), name, data)
    assert len(X) == 6 * 5 + 6 * 9
    torch.testing.assert_close(C, X.mT @ X / len(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "geometry",
    [{}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}, {"padding": 2, "padding_mode": "reflect"}],
)
def test_convolution_covariance_is_that_of_its_patches(geometry):
    """For W = the kernel matrix: Σ over positions ‖W p‖² = ‖conv(x)‖², so tr(W C Wᵀ) tells the patches apart."""
    conv = nn.Conv2d(2, 3, 3, bias=False, **geometry)
    model = nn.Sequential(conv)
    images = torch.randn(5, 2, 8, 8)
    C = input_covariances(model, ["0"], [images[:2], (images[2:], torch.zeros(3))])["0"]
    output = conv(images).movedim(1, -1).reshape(-1, 3)
    W = conv.weight.detach().reshape(3, -1)
    torch.testing.assert_close(W @ C @ W.mT, output.mT @ output / len(output), rtol=1e-4, atol=1e-5)


def test_activation_aware_model_is_closer_than_svd():
    dense, data = make_bert().eval(), batches()
    # Correlated inputs, as real ones are: embeddings of low rank.
    with torch.no_grad():
        table = dense.bert.embeddings.word_embeddings.weight
        table.copy_(torch.randn(40, 3) @ torch.randn(3, 16))
        expected = dense(input_ids=data[0]["input_ids"], attention_mask=data[0]["attention_mask"]).logits
    distances = {}
    for start in ("svd", "activation_aware"):
        model = copy.deepcopy(dense)
        config = CondLRConfig(rank_ratio=0.3, init_weights=start)
        get_robust_lowrank_model(model, config, calibration_data=data if start == "activation_aware" else None)
        with torch.no_grad():
            logits = model(input_ids=data[0]["input_ids"], attention_mask=data[0]["attention_mask"]).logits
        distances[start] = (logits - expected).norm().item()
        errors = [layer.whitened_truncation_error for layer in model.condlr.report.converted.values()]
        assert all(error is not None for error in errors) == (start == "activation_aware")
    assert distances["activation_aware"] < 0.7 * distances["svd"]


def test_data_that_does_not_reach_a_layer_is_refused():
    model = make_bert()
    with pytest.raises(ConversionError, match=r"must reach 'bert\.pooler\.dense' and be finite; received none"):
        input_covariances(model, ["bert.pooler.dense"], [])


def test_inputs_that_are_not_finite_are_refused():
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ConversionError, match="received values that are not finite"):
        input_covariances(model, ["0"], [torch.full((2, 3), torch.nan)])
