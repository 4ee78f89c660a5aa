"""The step where the host runs ahead of the device, as on a GPU: it waits for nothing."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from hf_condlr import attach_manifold_step
from hf_condlr.distributed.collectives import finish
from hf_condlr.distributed.shards import rows_of
from hf_condlr.errors import ConditioningError
from hf_condlr.manifold.bases import BasisStack
from hf_condlr.manifold.cores import CoreStack
from tests.manifold.nets import (
    INF,
    OPTIMIZERS,
    assert_guarantee,
    layers_of,
    make_model,
    make_model_of_all_tolerances,
    random_gradients,
)


def alone(work):
    """What a method of a stack yields is to be summed over the processes: of one process it is the sum."""
    finish(work, rows_of(torch.empty(1, 1)))


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
            stack.remember()  # the first one decomposes
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
            stack.remember()
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
