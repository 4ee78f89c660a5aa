"""The manifold step: the guarantee after every step, the formula of one step, and everything that may go wrong."""

import copy
import io
import logging
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from hf_condlr import CondLRConfig, attach_manifold_step, get_robust_lowrank_model
from hf_condlr.distributed.collectives import finish
from hf_condlr.distributed.shards import rows_of
from hf_condlr.errors import ConditioningError, OptimizerError
from hf_condlr.layers import LowRankConv2d, LowRankLayer, LowRankLinear
from hf_condlr.linalg import condition_number, orthonormality_error
from hf_condlr.manifold.bases import BasisStack
from hf_condlr.manifold.cores import CoreStack
from tests.linalg.reference import array, manifold_step, project_horizontal, qr

INF = math.inf


class Net(nn.Module):
    """Two pairs of equal shapes, a tall one, a convolution, and a dense layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)
        self.tall = nn.Linear(24, 10)
        self.dense = nn.Linear(10, 3)

    def forward(self, x):
        x = torch.tanh(self.conv(x)).mean((2, 3)).repeat(1, 4)
        return self.dense(torch.tanh(self.tall(torch.tanh(self.b(torch.tanh(self.a(x)))))))


def make_model(tau=0.1, dtype=torch.float32, **kwargs):
    config = CondLRConfig(target_modules=["conv", "a", "b", "tall"], tau=tau, **({"rank_ratio": 0.4} | kwargs))
    return get_robust_lowrank_model(Net().to(dtype), config)


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}


def alone(work):
    """What a method of a stack yields is to be summed over the processes: of one process it is the sum."""
    finish(work, rows_of(torch.empty(1, 1)))


def random_gradients(model, scale=1.0):
    for p in model.parameters():
        p.grad = torch.randn_like(p) * scale


def assert_guarantee(model, handle):
    """‖UᵀU−I‖_F ≤ 1e-5 √r (measured: 5e-7 √r), κ(S) ≤ bound (1+1e-4) (measured: 1e-6 for τ = 0, else below)."""
    for name, bound in handle.bounds().items():
        layer = model.get_submodule(name)
        assert layer.bound == bound
        for basis in (layer.U, layer.V):
            assert orthonormality_error(basis.detach()).item() <= 1e-5 * math.sqrt(layer.r), name
        assert torch.isfinite(layer.S).all(), name
        if math.isfinite(bound):
            assert condition_number(layer.S.detach()).item() <= bound * (1 + 1e-4), name


OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=False, fused=False),
    "adamw-foreach": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True),
    "adamw-fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
    "adafactor": lambda p, lr: torch.optim.Adafactor(p, lr=lr),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr, momentum=0.5),
}


TAUS = {"tau_0": 0.0, "tau_01": 0.1, "tau_05": 0.5, "tau_3": 3.0, "tau_inf": INF}


def make_model_of_all_tolerances():
    """Every τ on a square, a tall, a wide layer and a convolution; never run forward."""

    def block():
        return nn.ModuleDict(
            {
                "square": nn.Linear(20, 20),
                "tall": nn.Linear(8, 24),
                "wide": nn.Linear(24, 8),
                "conv": nn.Conv2d(3, 8, 3),
            }
        )

    config = CondLRConfig(
        target_modules=["square", "tall", "wide", "conv"],
        rank_ratio=0.4,
        rank_pattern={"tau_0.wide": 1, "tau_3.wide": 1.0},
        tau_pattern={rf"{name}\..*": tau for name, tau in TAUS.items()},
    )
    return get_robust_lowrank_model(nn.ModuleDict({name: block() for name in TAUS}), config)


@pytest.mark.parametrize("warmup_steps", [0, 100])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_guarantee_after_every_step(optimizer, warmup_steps):
    model = make_model_of_all_tolerances()
    step = OPTIMIZERS[optimizer](model.parameters(), 0.02)
    handle = attach_manifold_step(step, model, warmup_steps=warmup_steps)
    for t in range(1, 201):
        random_gradients(model, scale=10.0 ** ((t % 5) - 2))
        step.step()
        assert handle.step_count == t
        assert_guarantee(model, handle)
    final = {name: 1 + TAUS[name.partition(".")[0]] for name in layers_of(model)}
    assert len(final) == 20
    assert handle.bounds() == pytest.approx(final)


@pytest.mark.parametrize("lr", [10.0, 1e6, 1e20])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw-fused"])
def test_guarantee_at_absurd_learning_rates(optimizer, lr):
    model = make_model(0.5)
    step = OPTIMIZERS[optimizer](model.parameters(), lr)
    for group in step.param_groups:
        group["weight_decay"] = 0.0
    handle = attach_manifold_step(step, model)
    for _ in range(20):
        random_gradients(model)
        step.step()
        assert_guarantee(model, handle)


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


def test_schedule_falls_geometrically_from_each_layers_own_condition():
    tau, steps = 0.1, 10
    model = make_model(tau)
    initial = {n: max(condition_number(x.S.detach()).item(), 1 + tau) for n, x in layers_of(model).items()}
    assert len(set(initial.values())) > 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    handle = attach_manifold_step(optimizer, model, warmup_steps=steps)
    for t in range(1, steps + 3):
        random_gradients(model)
        optimizer.step()
        p = min(1, t / steps)
        for name, bound in handle.bounds().items():
            assert bound == pytest.approx(initial[name] ** (1 - p) * (1 + tau) ** p)
        assert_guarantee(model, handle)


def test_schedule_starts_at_ten_thousand_at_most():
    model = make_model()
    with torch.no_grad():
        model.a.S[-1] *= 1e-9
    handle = attach_manifold_step(torch.optim.SGD(model.parameters(), lr=0.1), model, warmup_steps=5)
    assert handle.schedule.initial_condition["a"] == 1e4


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


def test_layer_without_gradient_stays_but_its_bound_tightens():
    model = make_model(0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = attach_manifold_step(optimizer, model, warmup_steps=4)
    U = model.b.U.detach().clone()
    for _ in range(4):
        random_gradients(model)
        for p in model.b.parameters():
            p.grad = None
        optimizer.step()
        assert_guarantee(model, handle)
    assert torch.equal(model.b.U, U)


@pytest.mark.parametrize("bad", [math.nan, INF])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw-fused"])
def test_gradients_that_are_not_finite_change_no_factor_and_poison_no_moment(optimizer, bad, caplog):
    model = make_model()
    step = OPTIMIZERS[optimizer](model.parameters(), 0.01)
    handle = attach_manifold_step(step, model)
    random_gradients(model)
    step.step()
    before = {n: [getattr(x, k).detach().clone() for k in "USV"] for n, x in layers_of(model).items()}
    for _ in range(3):
        random_gradients(model)
        model.a.U.grad[0, 0] = bad
        model.b.S.grad[1, 1] = bad
        with caplog.at_level(logging.WARNING, logger="hf_condlr"):
            step.step()
        assert_guarantee(model, handle)
    assert torch.equal(model.a.U, before["a"][0])
    assert torch.equal(model.b.S, before["b"][1])
    assert not torch.equal(model.b.U, before["b"][0])
    for name, layer in layers_of(model).items():
        for p in (layer.U, layer.S, layer.V):
            for moment in step.state[p].values():
                assert torch.isfinite(torch.as_tensor(moment)).all(), name
    said = [r for r in caplog.records if "not finite" in r.getMessage()]
    assert len(said) == 1  # once
    assert "a.U" in said[0].getMessage() and "b.S" in said[0].getMessage()


def test_fused_optimizer_with_found_inf_is_a_skipped_step():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    handle = attach_manifold_step(optimizer, model, warmup_steps=5)
    random_gradients(model)
    model.a.U.grad[0, 0] = INF
    before = copy.deepcopy(model.state_dict())
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(1.0)  # as GradScaler sets them
    optimizer.step()
    assert handle.step_count == 0
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    optimizer.found_inf = torch.tensor(0.0)
    random_gradients(model)
    optimizer.step()
    assert handle.step_count == 1
    assert_guarantee(model, handle)


def test_update_that_makes_a_core_vanish_is_refused_and_undone():
    """The other layers, in its stack and in others, have taken the step and obey their bounds."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_manifold_step(optimizer, model)
    random_gradients(model)
    optimizer.step()
    S, other = model.a.S.detach().clone(), model.tall.S.detach().clone()
    random_gradients(model)
    model.a.S.grad = S.clone()
    with pytest.raises(ConditioningError, match=r"core S must not vanish: .* after step 2 in a\. "):
        optimizer.step()
    assert torch.equal(model.a.S, S) and not torch.equal(model.tall.S, other)
    assert handle.step_count == 2
    assert_guarantee(model, handle)


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


def test_frozen_core_outside_its_bound_is_refused():
    model = make_model(0.1)
    model.a.S.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with pytest.raises(OptimizerError, match=r"a frozen S must obey its bound already.*a\.S \(κ = .*bound 1\.1\)"):
        attach_manifold_step(optimizer, model)


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


def test_equal_shapes_with_different_centers_and_tolerances():
    model = make_model(tau_pattern={"b": 2.0})
    model.b.center = "rms"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = attach_manifold_step(optimizer, model)
    for _ in range(5):
        random_gradients(model)
        optimizer.step()
        assert_guarantee(model, handle)
    assert handle.bounds()["a"] == pytest.approx(1.1)
    assert handle.bounds()["b"] == pytest.approx(3.0)
    assert condition_number(model.b.S.detach()).item() > 1.2


def _train(model, optimizer, steps, start=0):
    for t in range(start, start + steps):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(8, 2, 5, 5, generator=generator)
        y = torch.randint(0, 3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_resume_equals_no_interruption():
    """Model, optimizer and handle states are all there is; bit for bit."""
    torch.manual_seed(0)
    model = make_model()
    start = copy.deepcopy(model)

    def fresh(of):
        optimizer = torch.optim.AdamW(of.parameters(), lr=0.01)
        return optimizer, attach_manifold_step(optimizer, of, warmup_steps=8)

    optimizer, _ = fresh(model)
    _train(model, optimizer, 12)

    first = copy.deepcopy(start)
    optimizer, handle = fresh(first)
    _train(first, optimizer, 5)
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
    _train(second, optimizer, 7, start=5)
    for key, value in model.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_state_of_other_layers_is_refused():
    model = make_model()
    handle = attach_manifold_step(torch.optim.SGD(model.parameters(), lr=0.1), model)
    state = handle.state_dict()
    state["initial_condition"].pop("a")
    with pytest.raises(OptimizerError, match="must name the layers of this model; received a difference in a"):
        handle.load_state_dict(state)


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


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model = make_model(0.1, rank_ratio=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    attach_manifold_step(optimizer, model)
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


def test_bases_rounded_to_half_precision_are_orthonormal_again_and_w_stays():
    """Also where they do not move at first: a learning rate that warms up from 0, a frozen U."""
    model = make_model().bfloat16().float()
    model.a.U.requires_grad_(False)
    W = {name: layer.matrix() for name, layer in layers_of(model).items()}
    assert orthonormality_error(model.a.U.detach()).item() > 1e-3
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    handle = attach_manifold_step(optimizer, model, warmup_steps=10)
    for name, layer in layers_of(model).items():
        torch.testing.assert_close(layer.matrix(), W[name], rtol=0, atol=1e-6)
    random_gradients(model)
    optimizer.step()
    assert_guarantee(model, handle)


def test_core_frozen_in_the_warm_up_still_follows_its_bound():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = attach_manifold_step(optimizer, model, warmup_steps=6)
    for t in range(8):
        model.b.S.requires_grad_(t < 2)
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()
        assert_guarantee(model, handle)
    assert handle.bounds()["b"] == pytest.approx(1.1)


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


def test_metric_scaling_that_overflows_stays_out_of_the_moments():
    model = make_model()
    with torch.no_grad():
        model.a.S.mul_(1e-20)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    handle = attach_manifold_step(optimizer, model)
    random_gradients(model, scale=5.0)
    model.a.S.grad.zero_()
    optimizer.step()
    assert torch.isfinite(optimizer.state[model.a.U]["momentum_buffer"]).all()
    assert_guarantee(model, handle)


# ------------------------------------------------------------------------------------- projection every k-th step


def factors_of(model):
    return {name: [array(getattr(layer, k)) for k in "USV"] for name, layer in layers_of(model).items()}


@pytest.mark.parametrize("warmup_steps", [0, 10])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw-fused", "adafactor"])
def test_guarantee_after_every_third_step_and_after_settling(optimizer, warmup_steps):
    """In between the bases are not orthonormal and no bound is in force; the schedule counts optimizer steps."""
    model = make_model(0.5)
    step = OPTIMIZERS[optimizer](model.parameters(), 0.05)
    handle = attach_manifold_step(step, model, warmup_steps=warmup_steps, projection_interval=3)
    initial = handle.schedule.initial_condition
    for t in range(1, 15):
        random_gradients(model)
        step.step()
        p = min(1, t / warmup_steps) if warmup_steps else 1
        for name, bound in handle.bounds().items():
            assert bound == pytest.approx(initial[name] ** (1 - p) * 1.5**p)
        if t % 3:
            assert orthonormality_error(model.a.U.detach()).item() > 1e-3
            assert model.a.bound == INF
        if t == 7:
            handle.settle()
        if t % 3 == 0 or t == 7:
            assert_guarantee(model, handle)
            before = copy.deepcopy(model.state_dict())
            handle.settle()
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("settle_at", [None, 2])
def test_the_accumulated_displacement_is_brought_back(settle_at):
    """Three SGD steps with weight decay in NumPy: gradients projected at U₀, one projection of what they add up to.

    In float64 to 1e-10 (measured: 2e-14), also where the interval ends early.
    """
    torch.manual_seed(3)
    lr, decay, bound = 0.05, 0.3, 1.4
    model = make_model(bound - 1, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=decay)
    handle = attach_manifold_step(optimizer, model, metric_scaling=False, projection_interval=3)
    start = factors_of(model)
    now = copy.deepcopy(start)
    for t in range(1, 4):
        random_gradients(model)
        gradients = {n: [array(getattr(x, k).grad) for k in "USV"] for n, x in layers_of(model).items()}
        optimizer.step()
        for name, (U, S, V) in now.items():
            G_U, G_S, G_V = gradients[name]
            G_U, G_V = project_horizontal(start[name][0], G_U), project_horizontal(start[name][2], G_V)
            now[name] = [X - lr * (G + decay * X) for X, G in ((U, G_U), (S, G_S), (V, G_V))]
        if t == settle_at:
            handle.settle()
        if t in (settle_at, 3):
            for name in now:
                now[name] = manifold_step(*start[name], *now[name], bound, "nearest", retraction=qr)
            start = copy.deepcopy(now)
        for name, expected in now.items():
            for found, value in zip(factors_of(model)[name], expected, strict=True):
                assert np.abs(found - value).max() < 1e-10, (t, name)


def test_what_is_not_finite_between_projections_costs_that_step_only(caplog):
    """A held factor keeps what the steps before it in the interval gained, not only its last projection."""
    model = make_model()
    step = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    handle = attach_manifold_step(step, model, projection_interval=4)
    start = factors_of(model)
    for t in range(1, 5):
        random_gradients(model)
        if t in (2, 4):
            model.a.U.grad[0, 0] = math.nan
            model.b.S.grad[1, 1] = INF
        before = copy.deepcopy(model.state_dict())
        with caplog.at_level(logging.WARNING, logger="hf_condlr"):
            step.step()
        if t == 2:
            assert torch.equal(model.a.U, before["a.U"]) and torch.equal(model.b.S, before["b.S"])
            assert not torch.equal(model.b.U, before["b.U"])
    assert caplog.text.count("not finite") == 1
    assert_guarantee(model, handle)
    U = start["a"][0]
    expected = qr(U + project_horizontal(U, array(before["a.U"]) - U))
    assert np.abs(array(model.a.U) - expected).max() < 1e-5
    assert np.abs(expected - U).max() > 1e-3


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_an_update_that_is_not_finite_never_enters_between_projections(bad):
    model = make_model()
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach_manifold_step(step, model, projection_interval=3)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        random_gradients(model)
        step.param_groups[0]["lr"] = bad
        step.step()
    handle.settle()
    for name, layer in layers_of(model).items():
        assert torch.equal(layer.U, before[f"{name}.U"]) and torch.equal(layer.V, before[f"{name}.V"])
    assert_guarantee(model, handle)


def test_a_core_that_vanished_goes_back_to_the_last_projection():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_manifold_step(optimizer, model, projection_interval=2)
    for _ in range(2):
        random_gradients(model)
        optimizer.step()
    S = model.a.S.detach().clone()
    random_gradients(model)
    model.a.S.grad = S.clone()
    optimizer.step()
    with pytest.raises(ConditioningError, match=r"must not vanish: .* after step 3 in a\. "):
        handle.settle()
    assert torch.equal(model.a.S, S)
    assert_guarantee(model, handle)


def test_factors_that_lose_their_gradient_are_brought_back_too():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    handle = attach_manifold_step(optimizer, model, projection_interval=4)
    for t in range(1, 5):
        random_gradients(model)
        if t > 2:
            model.a.S.requires_grad_(False)
            for p in (*model.b.parameters(), model.a.S):
                p.grad = None
        optimizer.step()
        if t == 2:
            assert orthonormality_error(model.b.U.detach()).item() > 1e-3
    assert_guarantee(model, handle)


def test_resume_within_an_interval_equals_settling_there():
    """Saved at step 5 of intervals of 4: bit for bit what a training is that settles at step 5 and goes on."""
    torch.manual_seed(0)
    start = make_model()

    def fresh(of):
        optimizer = torch.optim.AdamW(of.parameters(), lr=0.01)
        return optimizer, attach_manifold_step(optimizer, of, warmup_steps=9, projection_interval=4)

    whole, resumed = copy.deepcopy(start), copy.deepcopy(start)
    optimizer, handle = fresh(whole)
    _train(whole, optimizer, 5)
    with pytest.raises(
        OptimizerError, match=r"saved where the constraint holds; received step 5, between .*Call settle\(\)"
    ):
        handle.state_dict()
    handle.settle()
    saved = copy.deepcopy({"m": whole.state_dict(), "o": optimizer.state_dict(), "h": handle.state_dict()})
    _train(whole, optimizer, 7, start=5)
    optimizer, handle = fresh(resumed)
    resumed.load_state_dict(saved["m"])
    optimizer.load_state_dict(saved["o"])
    handle.load_state_dict(saved["h"])
    _train(resumed, optimizer, 7, start=5)
    assert_guarantee(resumed, handle)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_loading_a_state_forgets_the_interval():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = attach_manifold_step(optimizer, model, projection_interval=5)
    weights, state = copy.deepcopy(model.state_dict()), handle.state_dict()
    random_gradients(model)
    optimizer.step()
    model.load_state_dict(weights)
    handle.load_state_dict(state)
    handle.settle()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_removing_settles():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    handle = attach_manifold_step(optimizer, model, projection_interval=5)
    random_gradients(model)
    optimizer.step()
    handle.remove()
    assert_guarantee(model, handle)


def test_training_with_an_interval_lowers_the_loss():
    torch.manual_seed(0)
    model = make_model(0.1, rank_ratio=0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    attach_manifold_step(optimizer, model, projection_interval=5)
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


@pytest.mark.parametrize("interval", [0, -1, 2.0, True, "4"])
def test_projection_interval_must_count(interval):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(OptimizerError, match="projection_interval must be an integer ≥ 1; received"):
        attach_manifold_step(optimizer, model, projection_interval=interval)


# --------------------------------------------------------------------------------------------------- refusals


def test_factors_made_half_precision_later_are_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_manifold_step(optimizer, model)
    model.bfloat16()
    random_gradients(model)
    with pytest.raises(OptimizerError, match=r"factors must be float32 or float64.*conv\.U \(torch\.bfloat16\)"):
        optimizer.step()


def test_schedule_free_optimizers_are_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.eval = lambda: None
    with pytest.raises(OptimizerError, match="must not swap parameters for evaluation"):
        attach_manifold_step(optimizer, model)


def test_closures_are_refused():
    model = make_model()
    for optimizer in (torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.LBFGS(model.parameters())):
        handle = attach_manifold_step(optimizer, model)
        with pytest.raises(OptimizerError, match="without a closure"):
            optimizer.step(lambda: torch.tensor(0.0))
        with pytest.raises(OptimizerError, match="without a closure"):
            optimizer.step(closure=lambda: torch.tensor(0.0))
        handle.remove()


def test_optimizer_without_the_factors_is_refused():
    dense = Net()
    optimizer = torch.optim.AdamW(dense.parameters(), lr=0.1)  # made before the conversion: a classic
    model = get_robust_lowrank_model(dense, CondLRConfig(rank_ratio=0.5))
    with pytest.raises(OptimizerError, match=r"must hold every trainable factor; received a\.U, a\.S, a\.V"):
        attach_manifold_step(optimizer, model)


def test_attaching_twice_is_refused():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    attach_manifold_step(optimizer, model)
    with pytest.raises(OptimizerError, match="must be called once"):
        attach_manifold_step(optimizer, model)


def test_half_precision_factors_are_refused():
    model = make_model(dtype=torch.bfloat16)
    with pytest.raises(OptimizerError, match=r"factors must be float32 or float64.*conv\.U \(torch\.bfloat16\)"):
        attach_manifold_step(torch.optim.AdamW(model.parameters(), lr=0.1), model)


def test_model_without_factored_layers_is_refused():
    model = Net()
    with pytest.raises(OptimizerError, match="must have factored layers"):
        attach_manifold_step(torch.optim.AdamW(model.parameters(), lr=0.1), model)


@pytest.mark.parametrize("steps", [-1, 0.5])
def test_warmup_steps_must_count(steps):
    model = make_model()
    with pytest.raises(OptimizerError, match="warmup_steps must be an integer ≥ 0"):
        attach_manifold_step(torch.optim.AdamW(model.parameters(), lr=0.1), model, warmup_steps=steps)


def test_conversion_covers_a_convolution():
    assert isinstance(make_model().conv, LowRankConv2d)


# ------------------------------------------------------------------------- where the host runs ahead of the device


@pytest.fixture
def running_ahead(monkeypatch):
    """The step as a GPU takes it, on a CPU: masks in place of branches, products in place of factorisations."""
    monkeypatch.setattr("hf_condlr.manifold.masks.runs_ahead", lambda X: True)


@pytest.mark.parametrize("warmup_steps", [0, 20])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw-fused"])
def test_guarantee_of_the_step_without_a_wait(running_ahead, optimizer, warmup_steps):
    model = make_model_of_all_tolerances()
    made = OPTIMIZERS[optimizer](model.parameters(), 0.05)
    handle = attach_manifold_step(made, model, warmup_steps=warmup_steps)
    for _ in range(30):
        random_gradients(model)
        made.step()
        assert_guarantee(model, handle)
    handle.check()


@pytest.mark.parametrize("lr", [10.0, 1e20])
def test_guarantee_of_the_step_without_a_wait_at_absurd_learning_rates(running_ahead, lr, caplog):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    handle = attach_manifold_step(optimizer, model)
    for _ in range(5):
        random_gradients(model)
        optimizer.step()
        assert_guarantee(model, handle)
    handle.check()


def test_the_step_without_a_wait_takes_the_same_way(running_ahead, monkeypatch):
    """Against the step of a CPU, 20 steps of AdamW: W differs by 2e-4 relative (the clips differ within 1e-3)."""
    torch.manual_seed(1)
    models = {True: make_model()}
    models[False] = copy.deepcopy(models[True])
    gradients = [[torch.randn_like(p) for p in models[True].parameters()] for _ in range(20)]
    for ahead, model in models.items():
        monkeypatch.setattr("hf_condlr.manifold.masks.runs_ahead", lambda X, ahead=ahead: ahead)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        attach_manifold_step(optimizer, model)
        for step in gradients:
            for p, gradient in zip(model.parameters(), step, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
    for name, layer in layers_of(models[True]).items():
        exact = layers_of(models[False])[name]
        W, expected = layer.to_dense().weight, exact.to_dense().weight
        assert (W - expected).norm() <= 2e-3 * expected.norm(), name


def test_flags_wait_until_they_are_asked_for(running_ahead, caplog):
    """NaN gradients and a core that vanishes: the factors are held at once, the news comes with `check`."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_manifold_step(optimizer, model)
    random_gradients(model, 0.1)
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    random_gradients(model, 0.1)
    model.a.U.grad[0, 0] = math.nan
    model.b.S.grad = model.b.S.detach().clone()
    optimizer.step()
    random_gradients(model, 0.0)
    optimizer.step()
    for key in ("a.U", "b.S"):
        assert torch.equal(model.state_dict()[key], before[key]), key
    assert_guarantee(model, handle)
    assert "kept their values" not in caplog.text
    with pytest.raises(ConditioningError, match=r"core S must not vanish: .* after step 2 in b\. "):
        handle.check()
    assert "far too large, at step 2: a.U, b.S kept their values" in caplog.text
    handle.check()  # said once
    assert handle.state_dict()["step_count"] == 3


@torch.no_grad()
def test_the_step_without_a_wait_is_one_graph(running_ahead):
    """Between gradients and projection nothing breaks a compiled graph; the result is that of the plain functions."""

    def make():
        torch.manual_seed(0)
        cores = [nn.Parameter(torch.eye(6) + 0.1 * torch.randn(6, 6)) for _ in range(2)]
        bases = [nn.Parameter(torch.linalg.qr(torch.randn(24, 6)).Q) for _ in range(2)]
        for p in [*bases, *cores]:
            p.grad = torch.randn_like(p)
        stacks = BasisStack(["a.U", "b.U"], bases, cores, False), CoreStack(["a", "b"], cores, [(5.0, 1.1)] * 2, "rms")
        return stacks, [*bases, *cores]

    def step(stacks, parameters):
        bases, cores = stacks
        for stack in stacks:
            stack.begin_interval()
            stack.ours = True  # the first one decomposes
        alone(bases.project_gradients(metric_scaling=True))
        alone(cores.sanitize_gradients())
        torch._foreach_add_(parameters, [p.grad for p in parameters], alpha=-0.1)
        alone(bases.retract_update(3))
        alone(cores.condition_update(1.0, 1.0, 3))
        for stack in stacks:
            stack.end_interval()

    (stacks, compiled), (others, expected) = make(), make()
    torch.compile(step, backend="eager", fullgraph=True)(stacks, compiled)
    step(others, expected)
    for p, q in zip(compiled, expected, strict=True):
        torch.testing.assert_close(p, q)
    assert not torch.equal(compiled[0], make()[1][0])


@torch.no_grad()
def test_no_step_reads_anything_back():
    """On a device of which only shapes exist every read is an error; so is a copy of a list of indices to it.

    Of the step after the first: that one decomposes, as it may meet any core.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):

        def on_gpu(*shape):
            p = nn.Parameter(torch.empty(*shape, device="cuda"))
            p.grad = torch.empty(*shape, device="cuda")
            return p

        cores = [on_gpu(6, 6) for _ in range(2)]
        bases = [
            BasisStack(["a.U", "b.U"], [on_gpu(24, 6) for _ in range(2)], cores, full_tangent)
            for full_tangent in (True, False)
        ]
        conditioned = [
            CoreStack(["a", "b"], cores, [(5.0, final)] * 2, center)
            for final in (1.0, 1.5, INF)
            for center in ("nearest", "rms", "mean")
        ]
        for stack in [*bases, *conditioned]:
            stack.begin_interval()
            stack.ours = True
        for stack in bases:
            alone(stack.project_gradients(metric_scaling=True))
            alone(stack.retract_update(7))
        for stack in conditioned:
            alone(stack.sanitize_gradients())
            alone(stack.condition_update(0.5, 0.4, 7))
        for stack in [*bases, *conditioned]:
            stack.end_interval()
        with pytest.raises(DataDependentOutputException):
            bases[0].held()


# --------------------------------------------------------------------------- when others write between the steps


@pytest.mark.parametrize("ahead", [False, True])
def test_weights_loaded_between_steps_are_brought_back_at_the_next_one(ahead, monkeypatch):
    """A core of κ = 10⁸ and bases that are not orthonormal, without a word to the handle."""
    if ahead:
        monkeypatch.setattr("hf_condlr.manifold.masks.runs_ahead", lambda X: True)
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    handle = attach_manifold_step(optimizer, model)
    for step in range(4):
        if step == 2:
            r = model.a.r
            state = model.state_dict() | {"a.S": torch.diag(torch.logspace(0, -8, r)), "a.U": torch.randn(24, r)}
            model.load_state_dict(state)
        random_gradients(model)
        optimizer.step()
        assert_guarantee(model, handle)


def test_a_tolerance_changed_between_steps_is_kept():
    model = make_model(2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    handle = attach_manifold_step(optimizer, model)
    for step in range(4):
        if step == 2:
            model.a.tau = 0.1
        random_gradients(model)
        optimizer.step()
        assert_guarantee(model, handle)
    assert handle.bounds()["a"] == pytest.approx(1.1)


class FailsHalfWay(torch.optim.Optimizer):
    """Moves the factors, and then has an error."""

    def __init__(self, params):
        super().__init__(params, {})
        self.failing = False

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.randn_like(p) if self.failing else -0.01 * p.grad)
        if self.failing:
            raise RuntimeError("half way")


@pytest.mark.parametrize("after", ["settle", "step"])
def test_an_optimizer_that_fails_half_way_is_no_harm(after):
    model = make_model()
    optimizer = FailsHalfWay(model.parameters())
    handle = attach_manifold_step(optimizer, model)
    random_gradients(model)
    optimizer.step()
    optimizer.failing = True
    with pytest.raises(RuntimeError, match="half way"):
        optimizer.step()
    with pytest.raises(OptimizerError, match="the state must be saved where the constraint holds"):
        handle.state_dict()
    optimizer.failing = False
    handle.settle() if after == "settle" else optimizer.step()
    assert_guarantee(model, handle)


def test_a_zero_core_at_the_start_trains():
    model = make_model()
    with torch.no_grad():
        model.a.S.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach_manifold_step(optimizer, model, metric_scaling=False)
    random_gradients(model)
    optimizer.step()
    assert_guarantee(model, handle)


def test_a_state_loaded_between_projections_promises_nothing():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_manifold_step(optimizer, model, projection_interval=4)
    for step in range(7):
        if step == 4:
            state = handle.state_dict()
        random_gradients(model)
        optimizer.step()
    handle.load_state_dict(state)
    assert model.a.bound == INF


def test_factors_converted_between_projections_are_brought_back():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = attach_manifold_step(optimizer, model, projection_interval=4)
    for _ in range(6):
        random_gradients(model)
        optimizer.step()
    model.double()
    for p in model.parameters():
        p.grad = None
    handle.settle()
    assert_guarantee(model, handle)


def test_the_longest_warm_up_is_followed_without_a_wait(running_ahead):
    """κ from 10⁴, small steps of the bound: no core is ever held, none exceeds its bound."""
    model = make_model()
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.S.copy_(torch.diag(torch.logspace(0, -4, layer.r)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    handle = attach_manifold_step(optimizer, model, warmup_steps=3000)
    for _ in range(40):
        random_gradients(model)
        optimizer.step()
        assert_guarantee(model, handle)
        assert not handle._stacks.held()
