"""The manifold step under any optimizer and in any training loop: the formula of one step, and equal trainings."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from hf_condlr import CondLRConfig, attach_manifold_step, get_robust_lowrank_model
from hf_condlr.layers import LowRankLinear
from hf_condlr.linalg import orthonormality_error
from tests.manifold.nets import (
    INF,
    assert_guarantee,
    layers_of,
    make_model,
    random_gradients,
    train,
)


def test_one_sgd_step_is_the_formula():
    """U⁺ spans U − lr (I−UUᵀ)G_U/c², V⁺ likewise, S⁺ = clip(S − lr G_S): W⁺ against float64 NumPy."""
    torch.manual_seed(3)
    tau, lr = 0.3, 0.07
    model = make_model(tau, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    attach_manifold_step(optimizer, model)
    random_gradients(model)
    before = {
        name: [getattr(layer, k).detach().numpy().copy() for k in "USV"]
        + [getattr(layer, k).grad.numpy().copy() for k in "USV"]
        for name, layer in layers_of(model).items()
    }
    optimizer.step()
    for name, layer in layers_of(model).items():
        U, S, V, G_U, G_S, G_V = before[name]
        c_squared = (S**2).sum() / len(S)
        new_bases = []
        for basis, gradient in ((U, G_U), (V, G_V)):
            X = basis - lr * (gradient - basis @ (basis.T @ gradient)) / c_squared
            Q, R = np.linalg.qr(X)
            new_bases.append(Q * np.sign(np.diag(R)))
        P, sigma, Qh = np.linalg.svd(S - lr * G_S)
        grid = np.linspace(sigma[-1] / (1 + tau), sigma[0], 200001)
        cost = (np.clip(grid[:, None] - sigma, 0, None) ** 2).sum(1)
        cost += (np.clip(sigma - (1 + tau) * grid[:, None], 0, None) ** 2).sum(1)
        low = grid[cost.argmin()]  # brute force, to the width of the grid
        expected = new_bases[0] @ (P * np.clip(sigma, low, (1 + tau) * low)) @ Qh @ new_bases[1].T
        assert np.abs(layer.matrix().detach().numpy() - expected).max() < 1e-4 * np.abs(expected).max(), name
        assert np.abs(layer.U.detach().numpy() - new_bases[0]).max() < 1e-12, name


def test_unconstrained_core_takes_the_plain_step():
    model = make_model(INF)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_manifold_step(optimizer, model)
    random_gradients(model)
    expected = {name: layer.S.detach() - 0.1 * layer.S.grad for name, layer in layers_of(model).items()}
    optimizer.step()
    for name, layer in layers_of(model).items():
        torch.testing.assert_close(layer.S.detach(), expected[name], rtol=0, atol=1e-6)


def test_gradients_are_horizontal_when_the_optimizer_sees_them():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    attach_manifold_step(optimizer, model)
    random_gradients(model)
    bases = {n: (x.U.detach().clone(), x.V.detach().clone()) for n, x in layers_of(model).items()}
    optimizer.step()
    for name, layer in layers_of(model).items():
        for old, p in zip(bases[name], (layer.U, layer.V), strict=True):
            assert (old.mT @ p.grad).abs().max() < 1e-5


def test_metric_scaling_is_on_for_sgd_and_off_for_others_and_settable():
    for optimizer_class, default in ((torch.optim.SGD, True), (torch.optim.AdamW, False)):
        for setting in (None, True, False):
            model = make_model()
            optimizer = optimizer_class(model.parameters(), lr=0.1)
            attach_manifold_step(optimizer, model, metric_scaling=setting)
            layer = model.a
            random_gradients(model)
            U, G = layer.U.detach().clone(), layer.U.grad.clone()
            c_squared = layer.S.detach().square().sum().item() / layer.r
            optimizer.step()
            scale = 1 / c_squared if (default if setting is None else setting) else 1.0
            torch.testing.assert_close(layer.U.grad, (G - U @ (U.mT @ G)) * scale, rtol=1e-4, atol=1e-5)


def test_zero_gradients_change_nothing():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    attach_manifold_step(optimizer, model)
    random_gradients(model)
    optimizer.step()  # S is feasible from here on
    optimizer.state.clear()
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_frozen_factors_do_not_move():
    model = make_model()
    model.a.U.requires_grad_(False)
    model.b.requires_grad_(False)
    model.b.S.copy_(torch.eye(model.b.r))  # feasible
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    handle = attach_manifold_step(optimizer, model)
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()
        assert_guarantee(model, handle)
    for key in ("a.U", "b.U", "b.S", "b.V"):
        assert torch.equal(model.state_dict()[key], before[key]), key
    assert not torch.equal(model.a.V, before["a.V"])


def test_frozen_core_keeps_the_rotation_of_the_bases():
    """With S frozen the whole tangent space is used: the gradient keeps U Ω, Ω skew, which S cannot absorb."""
    model = make_model()
    with torch.no_grad():
        model.a.S.copy_(torch.eye(model.a.r))
    model.a.S.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    handle = attach_manifold_step(optimizer, model)
    skew = torch.randn(model.a.r, model.a.r)
    skew = skew - skew.mT
    U = model.a.U.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    model.a.U.grad = U @ skew
    optimizer.step()
    torch.testing.assert_close(model.a.U.grad, U @ skew, rtol=1e-4, atol=1e-5)
    assert (model.a.U - U).norm() > 1e-2
    assert_guarantee(model, handle)


def test_factors_of_one_layer_in_different_groups():
    model = make_model()
    groups = [
        {"params": [p for n, p in model.named_parameters() if n.endswith(".S")], "lr": 0.001},
        {"params": [p for n, p in model.named_parameters() if not n.endswith(".S")], "lr": 0.05, "weight_decay": 0.5},
    ]
    optimizer = torch.optim.AdamW(groups)
    handle = attach_manifold_step(optimizer, model)
    for _ in range(5):
        random_gradients(model)
        optimizer.step()
        assert_guarantee(model, handle)


def test_resume_equals_no_interruption():
    """Model, optimizer and handle states are all there is; bit for bit."""
    torch.manual_seed(0)
    model = make_model()
    start = copy.deepcopy(model)

    def fresh(of):
        optimizer = torch.optim.AdamW(of.parameters(), lr=0.01)
        return optimizer, attach_manifold_step(optimizer, of, warmup_steps=8)

    optimizer, _ = fresh(model)
    train(model, optimizer, 12)

    first = copy.deepcopy(start)
    optimizer, handle = fresh(first)
    train(first, optimizer, 5)
    buffer = io.BytesIO()
    torch.save({"m": first.state_dict(), "o": optimizer.state_dict(), "h": handle.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    second = copy.deepcopy(start)
    optimizer, handle = fresh(second)
    second.load_state_dict(saved["m"])
    optimizer.load_state_dict(saved["o"])
    handle.load_state_dict(saved["h"])
    assert handle.step_count == 5
    assert second.a.bound == first.a.bound
    train(second, optimizer, 7, start=5)
    for key, value in model.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_accumulated_gradients_equal_the_joined_batch():
    """k · b samples in k backward passes against one, after 5 Adam steps in float64 to 1e-9 (measured: 1e-11)."""
    joined = make_model(dtype=torch.float64)
    accumulated = copy.deepcopy(joined)
    results = []
    for model, parts in ((joined, 1), (accumulated, 4)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        handle = attach_manifold_step(optimizer, model, warmup_steps=3)
        generator = torch.Generator().manual_seed(5)
        for _ in range(5):
            x = torch.randn(16, 2, 5, 5, generator=generator, dtype=torch.float64)
            y = torch.randint(0, 3, (16,), generator=generator)
            optimizer.zero_grad()
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (nn.functional.cross_entropy(model(xs), ys) / parts).backward()
            optimizer.step()
        assert handle.step_count == 5
        results.append(torch.cat([layer.matrix().flatten() for layer in layers_of(model).values()]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("interval", [1, 5])
def test_training_lowers_the_loss(interval):
    torch.manual_seed(0)
    model = make_model(0.1, rank_ratio=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    attach_manifold_step(optimizer, model, projection_interval=interval)
    x = torch.randn(64, 2, 5, 5)
    y = (x.mean((1, 2, 3)) > 0).long()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_removed_handle_no_longer_acts():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_manifold_step(optimizer, model)
    handle.remove()
    random_gradients(model)
    optimizer.step()
    assert orthonormality_error(model.a.U.detach()).item() > 1e-2
    attach_manifold_step(optimizer, model)  # and another can take its place


def test_step_ignores_autocast_and_reduced_precision_outside():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    handle = attach_manifold_step(optimizer, model)
    torch.set_float32_matmul_precision("medium")
    try:
        for _ in range(3):
            random_gradients(model)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                optimizer.step()
            assert_guarantee(model, handle)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_accelerate_wrapper_before_and_after_prepare():
    from accelerate import Accelerator

    for attach_first in (True, False):
        accelerator = Accelerator(cpu=True)
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        handle = attach_manifold_step(optimizer, model) if attach_first else None
        model, optimizer = accelerator.prepare(model, optimizer)
        handle = handle or attach_manifold_step(optimizer, model)
        random_gradients(model)
        optimizer.step()
        assert handle.step_count == 1
        assert_guarantee(model, handle)


def test_module_used_twice_is_one_layer():
    shared = nn.Linear(12, 12)
    model = get_robust_lowrank_model(nn.Sequential(shared, nn.Tanh(), shared), CondLRConfig(rank_ratio=0.5))
    assert isinstance(model[0], LowRankLinear) and model[0] is model[2]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    handle = attach_manifold_step(optimizer, model)
    model(torch.randn(4, 12)).square().sum().backward()
    optimizer.step()
    assert len(handle.layers) == 1
    assert_guarantee(model, handle)


class Averaging(torch.optim.Optimizer):
    """Moves the parameters after an optimizer inside it, as Lookahead does."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self, closure=None):
        before = [p.detach().clone() for g in self.param_groups for p in g["params"]]
        self.optimizer.step()
        for p, old in zip((p for g in self.param_groups for p in g["params"]), before, strict=True):
            p.data.lerp_(old, 0.5)


def test_the_step_comes_after_a_wrapping_optimizer():
    model = make_model()
    optimizer = Averaging(torch.optim.SGD(model.parameters(), lr=0.5))
    handle = attach_manifold_step(optimizer, model)
    for _ in range(3):
        random_gradients(model)
        optimizer.step()
        assert_guarantee(model, handle)
