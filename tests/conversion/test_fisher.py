"""Gradients of the predictions at layers' outputs, and the start and the ranks that follow from them."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_condlr import CondLRConfig, get_robust_lowrank_model
from hf_condlr.conversion.measuring import output_fisher
from hf_condlr.conversion.predictions import sampled_gradient
from hf_condlr.conversion.spectra import activation_aware, fisher
from hf_condlr.errors import ConfigError, ConversionError
from tests.conversion.calibration_data import batches, make_bert
from tests.conversion.reference import fisher_root, whiten

QUERY = "bert.encoder.layer.0.attention.self.query"


def covariance(size, rank, samples=200):
    X = torch.randn(samples, rank) @ torch.randn(rank, size)
    return X.mT @ X / samples


def exact_fisher(model, name, data):
    """E_x E_{ŷ ~ p} Σ_t g_t g_tᵀ in float64, the expectation over ŷ by a sum over classes; also the model's p."""
    layer, kept = model.get_submodule(name), []
    hook = layer.register_forward_hook(lambda module, args, output: kept.append(output))
    total, samples = 0, 0
    for batch in data:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
        for i, k in ((i, k) for i in range(len(logits)) for k in range(logits.shape[1])):
            (g,) = torch.autograd.grad(-logits[i, k], kept[-1], retain_graph=True)
            total = total + logits[i, k].exp().item() * torch.einsum("tm,tn->mn", g[i].double(), g[i].double())
        samples += len(logits)
    hook.remove()
    return total / samples


def test_moments_are_the_fisher_matrix_at_the_outputs():
    """ŷ is drawn once a sample: with two classes, the data a hundred times, the mean agrees to a few percent."""
    model, data = make_bert().eval(), batches()
    expected = exact_fisher(model, QUERY, data)
    F = output_fisher(model, [QUERY], data * 100)[QUERY]
    assert (F - expected).norm() < 0.08 * expected.norm()  # measured: 0.02
    torch.testing.assert_close(F, F.mT)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_the_gradient_is_that_of_the_log_likelihood_of_what_was_drawn(problem):
    torch.manual_seed(0)
    z = torch.randn(600, 3, dtype=torch.float64).requires_grad_()  # more rows than are drawn at a time
    g = sampled_gradient(z, problem, torch.Generator().manual_seed(0))
    if problem == "regression":
        drawn = z.detach() - g
        loss = (z - drawn).square().sum() / 2
    elif problem == "multi_label_classification":
        drawn = z.detach().sigmoid() - g
        loss = nn.functional.binary_cross_entropy_with_logits(z, drawn.round(), reduction="sum")
    else:
        drawn = z.detach().softmax(-1) - g
        torch.testing.assert_close(drawn.sum(-1), torch.ones(600, dtype=torch.float64))
        loss = nn.functional.cross_entropy(z, drawn.argmax(-1), reduction="sum")
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], g)
    mean = {"regression": z, "multi_label_classification": z.sigmoid(), "single_label_classification": z.softmax(-1)}
    assert (drawn - mean[problem].detach()).mean(0).abs().max() < 0.12  # 3 standard errors of 600 rows


def test_the_model_and_the_random_state_stay_as_they_are():
    model, data = make_bert().train(), batches()
    model.bert.embeddings.requires_grad_(False)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    first = output_fisher(model, [QUERY], data)[QUERY]
    assert torch.equal(torch.random.get_rng_state(), state) and model.training
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][0]) and p.requires_grad == before[name][1] and p.grad is None
    assert torch.equal(first, output_fisher(model, [QUERY], data)[QUERY])  # dropout is off, the draws are fixed


def test_convolutions_count_their_positions():
    """For a linear classifier of mean-pooled channels g is the same at all positions: F = H W/(H W)² E[w w^T]."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(3 * 36, 2))
    F = output_fisher(model, ["0"], [torch.randn(5, 2, 8, 8)])["0"]
    assert F.shape == (3, 3) and torch.linalg.eigvalsh(F.double())[0] > -1e-7 and F.trace() > 0


def test_causal_models_leave_padding_out():
    config = GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    name, ids = "transformer.h.0.mlp.c_fc", torch.randint(1, 30, (2, 9))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    padded = output_fisher(model, [name], [{"input_ids": ids, "attention_mask": mask}])[name]
    cut = output_fisher(model, [name], [{"input_ids": ids[:, :6], "attention_mask": mask[:, :6]}])[name]
    torch.testing.assert_close(padded, cut)
    assert padded.shape == (32, 32)


@pytest.mark.parametrize("rank_of_f", [30, 2])
def test_error_is_the_optimum_in_the_metric_of_the_loss(rank_of_f):
    """‖F̃^{1/2}(W − Ŵ)C^{1/2}‖² = Σ_{i>r} σ_i², the tail of the spectrum of F̃^{1/2} W C^{1/2}, F̃ = F + (tr F/m) I."""
    W, C, F = torch.randn(30, 20), covariance(20, 20), covariance(30, rank_of_f)
    damped = F.double() + F.double().trace() / 30 * torch.eye(30, dtype=torch.float64)
    torch.testing.assert_close(fisher_root(F) @ fisher_root(F), damped, rtol=1e-6, atol=1e-5)
    sigma = torch.linalg.svdvals(fisher_root(F) @ whiten(W, C))
    for r in (1, 6, 15):
        U, S, V = fisher(W, r, C, F)
        torch.testing.assert_close(U.mT @ U, torch.eye(r), rtol=0, atol=1e-5)
        torch.testing.assert_close(V.mT @ V, torch.eye(r), rtol=0, atol=1e-5)
        error = (fisher_root(F) @ whiten(W - U @ S @ V.mT, C)).norm().item()
        assert error == pytest.approx(sigma[r:].norm().item(), rel=1e-4)
        other = activation_aware(W, r, C)
        assert (fisher_root(F) @ whiten(W - other[0] @ other[1] @ other[2].mT, C)).norm() > error


def test_without_gradients_it_is_the_activation_aware_start():
    W, C = torch.randn(12, 9), covariance(9, 9)
    U, S, V = fisher(W, 4, C, torch.zeros(12, 12))
    P, T, Q = activation_aware(W, 4, C)
    torch.testing.assert_close(U @ S @ V.mT, P @ T @ Q.mT, rtol=1e-4, atol=1e-5)


class Gated(nn.Module):
    """Two branches, of which the classifier sees the second a hundred times less."""

    def __init__(self):
        super().__init__()
        self.seen, self.ignored, self.classifier = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x):
        return self.classifier(self.seen(x).tanh() + 0.01 * self.ignored(x).tanh())


def divergence(model, reference, x):
    p, q = reference(x).log_softmax(-1), model(x).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def test_ranks_go_where_the_predictions_need_them():
    dense, x = Gated(), torch.randn(256, 24)
    dense.classifier.weight.data *= 5
    found = {}
    for allocation, start in (("uniform", "activation_aware"), ("energy", "activation_aware"), ("fisher", "fisher")):
        config = CondLRConfig(
            target_modules=["seen", "ignored"],
            compression_ratio=0.6,
            rank_allocation=allocation,
            init_weights=start,
        )
        model = get_robust_lowrank_model(copy.deepcopy(dense), config, calibration_data=x.split(64))
        with torch.no_grad():
            found[allocation] = divergence(model, dense, x)
        if allocation == "fisher":  # every layer is converted, though the budget would pay for a dense one
            ranks = {name: layer.r for name, layer in model.condlr.report.converted.items()}
    assert set(ranks) == {"seen", "ignored"} and ranks["seen"] > 3 * ranks["ignored"]
    assert found["fisher"] < 0.5 * min(found["uniform"], found["energy"])


@pytest.mark.parametrize("tau", [0.1, "inf"])
def test_a_layer_that_matters_most_stays_dense_where_no_bound_is_asked_for(tau):
    """0.6 of the weights of two equal layers are one of them and rank 2 of the other: 576 + 100 ≤ 691."""
    model = Gated()
    config = CondLRConfig(
        target_modules=["seen", "ignored"],
        compression_ratio=0.4,
        rank_allocation="fisher",
        init_weights="fisher",
        tau=tau,
    )
    get_robust_lowrank_model(model, config, calibration_data=torch.randn(256, 24).split(64))
    assert ("seen" in model.condlr.report.skipped) == (tau == "inf")


def test_allocation_goes_with_any_start():
    for start in ("svd", "activation_aware"):
        model = Gated()
        config = CondLRConfig(
            target_modules=["seen", "ignored"], compression_ratio=0.6, rank_allocation="fisher", init_weights=start
        )
        get_robust_lowrank_model(model, config, calibration_data=[torch.randn(32, 24)])
        errors = [layer.truncation_error for layer in model.condlr.report.converted.values()]
        assert len(errors) == 2 and all(0 < error < 1 for error in errors)


def test_it_needs_calibration_data():
    config = CondLRConfig(target_modules=["seen"], compression_ratio=0.6, rank_allocation="fisher")
    with pytest.raises(ConfigError, match=r"rank_allocation='fisher', no calibration_data\. Pass calibration_data"):
        get_robust_lowrank_model(Gated(), config)


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Sequential(nn.Linear(4, 1)), r"received logits of shape \(8, 1\)"),
        (nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)), nn.Unflatten(1, (1, 2))), r"shape \(8, 1, 2, 2\)"),
    ],
)
def test_models_without_classes_are_refused(model, message):
    with pytest.raises(ConversionError, match=message):
        output_fisher(model, ["0"], [torch.randn(8, 4)])


def test_what_is_not_finite_or_does_not_arrive_is_refused():
    model = Gated()
    with pytest.raises(ConversionError, match="must be finite; received NaN or inf"):
        output_fisher(model, ["seen"], [torch.full((2, 24), torch.nan)])
    with pytest.raises(ConversionError, match="must reach 'seen' and be finite; received none"):
        output_fisher(model, ["seen"], [])
    model.forward = lambda x: model.classifier((0 * model.seen(x)).sqrt())  # 0 · ∞ on the way back
    with pytest.raises(ConversionError, match="must reach 'seen' and be finite; received values that are not"):
        output_fisher(model, ["seen"], [torch.randn(64, 24)])
