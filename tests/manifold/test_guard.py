"""Training cannot lose its constraint: writes past torch's version counter, other optimizers, layers that change."""

import contextlib
import copy
from pkgutil import resolve_name

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters

from hf_condlr import CondLRConfig, attach_manifold_step, get_robust_lowrank_model
from hf_condlr.errors import ConditioningError, OptimizerError
from hf_condlr.linalg import orthonormality_error
from tests.manifold.nets import Net, assert_guarantee, layers_of, make_model, random_gradients


def trained(optimizer_class=torch.optim.SGD, steps=2, frozen=(), model=None, lr=1e-3, **kwargs):
    """A model after some steps, its optimizer and its handle."""
    torch.manual_seed(0)
    model = model or make_model()
    optimizer = optimizer_class(model.parameters(), lr=lr)
    handle = attach_manifold_step(optimizer, model, **kwargs)
    for _ in range(steps):
        random_gradients(model)
        optimizer.step()
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
        model.get_parameter(name).grad = None
    return model, optimizer, handle


def through_numpy(model):
    model.a.U.detach().numpy()[:, 0] *= 3


def through_vector(model):
    vector = parameters_to_vector(model.parameters()).detach()
    vector_to_parameters(vector * 1.5, model.parameters())


def through_half(model):
    for p in model.a.parameters():
        p.data = p.data.half().float()


WRITES = {
    "data": lambda model: model.a.U.data.mul_(1.5),
    "one entry": lambda model: model.a.U.data[3:4, 1].add_(0.5),
    "rows of one column": lambda model: model.a.U.data[:, 0].copy_(model.a.U.data[:, 0].flip(0)),
    "signs": lambda model: model.a.U.data.abs_(),
    "frozen V": lambda model: model.b.V.data.mul_(2.0),
    "frozen S": lambda model: model.b.S.data.copy_(torch.diag(torch.logspace(0, -3, model.b.r))),
    "numpy": through_numpy,
    "vector_to_parameters": through_vector,
    "half and float": through_half,
}


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("write", WRITES)
def test_writes_past_the_version_counter_are_noticed_and_leave_w_as_they_made_it(write, ahead, interval, monkeypatch):
    """With small gradients and a wide bound: W after the next step is what the write left."""
    monkeypatch.setattr("hf_condlr.manifold.masks.runs_ahead", lambda X: ahead)
    model, optimizer, handle = trained(frozen=("b.S", "b.V"), model=make_model(99.0), projection_interval=interval)
    WRITES[write](model)
    W = {name: layer.matrix().detach() for name, layer in layers_of(model).items()}
    random_gradients(model, 1e-3)
    for name in ("b.S", "b.V"):
        model.get_parameter(name).grad = None
    optimizer.step()
    handle.settle()
    assert_guarantee(model, handle)
    for name, layer in layers_of(model).items():
        if (name, write) != ("b", "frozen S"):  # that S is conditioned
            assert (layer.matrix() - W[name]).norm() < 1e-4 * W[name].norm(), name


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("interval", [1, 2])
def test_a_factor_frozen_after_its_gradient_was_made(bad, interval):
    """A fused optimizer moves it all the same, without raising its version."""
    model, optimizer, handle = trained(
        lambda p, lr: torch.optim.AdamW(p, lr=0.05, fused=True), projection_interval=interval
    )
    for _ in range(3):
        random_gradients(model)
        model.a.U.requires_grad_(False)
        model.a.S.requires_grad_(False)
        if bad:
            model.a.U.grad[0, 0] = torch.nan
        optimizer.step()
        if handle.step_count % interval == 0:
            assert_guarantee(model, handle)
    assert torch.isfinite(model.a.U).all()


class MovesAll(torch.optim.Optimizer):
    """Moves every parameter, with or without a gradient, past the version counter."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(torch.randn_like(p), alpha=group["lr"])


def test_factors_without_a_gradient_that_the_optimizer_moves():
    model, optimizer, handle = trained(MovesAll)
    for p in model.parameters():
        p.grad = None
    for _ in range(3):
        optimizer.step()
        assert_guarantee(model, handle)


def test_nothing_is_done_where_nothing_was_written():
    model, optimizer, handle = trained()
    before = copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    with torch.no_grad():
        model.a.U.mul_(2.0).mul_(0.5)
    handle.settle()
    random_gradients(model, 0.0)
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------ layers that change


def test_a_core_of_two_layers_is_refused():
    model = make_model()
    model.b.S, model.b.tau = model.a.S, 3.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(OptimizerError, match=r"a factor must belong to one layer.*b\.S"):
        attach_manifold_step(optimizer, model)


def share(model):
    model.b.S = model.a.S


def parametrized(model):
    parametrize.register_parametrization(model.a, "U", nn.Tanh())


def exchanged(model):
    model.a = copy.deepcopy(model.a)


def converted(model):
    get_robust_lowrank_model(model, CondLRConfig(target_modules=["dense"], rank_ratio=1.0))


CHANGES = {
    share: r"a factor must belong to one layer.*b\.S",
    parametrized: r"factors must be parameters of their layer.*a\.U",
    exchanged: r"the factored layers must be those .*received others: a",
    converted: r"the factored layers must be those .*received others: dense",
}


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_change_after_attaching_are_refused_at_the_next_step(change):
    model, optimizer, _handle = trained()
    change(model)
    random_gradients(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptimizerError, match=CHANGES[change]):
        optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ----------------------------------------------------------------------------------------------- hooks and optimizers


def test_a_later_hook_that_writes_factors_is_noticed():
    model, optimizer, handle = trained()
    optimizer.register_step_post_hook(lambda *_: model.a.U.data.mul_(1.1))
    for _ in range(3):
        random_gradients(model)
        optimizer.step()
        W = model.a.matrix().detach()
        handle.settle()
        assert_guarantee(model, handle)
        torch.testing.assert_close(model.a.matrix(), W, rtol=0, atol=1e-5)


def test_check_withdraws_the_bound_of_layers_that_were_written(caplog):
    model, _optimizer, handle = trained()
    model.a.U.data.mul_(1.1)
    handle.check()
    assert model.a.bound == float("inf") and model.b.bound == pytest.approx(1.1)
    assert "a.U" in caplog.text and "settle()" in caplog.text
    handle.settle()
    assert_guarantee(model, handle)
    model.b.S.data[0] *= 5
    handle.state_dict()
    assert model.b.bound == float("inf")


class SAM(torch.optim.Optimizer):
    """As the common implementation of sharpness-aware minimisation: it steps an optimizer over the same groups."""

    def __init__(self, params, base_optimizer=torch.optim.SGD, **kwargs):
        super().__init__(params, kwargs)
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[p]["old"] = p.data.clone()
            p.add_(0.05 * p.grad / p.grad.norm())

    @torch.no_grad()
    def second_step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.data = self.state[p]["old"]
        self.base_optimizer.step()


def test_the_optimizer_inside_an_optimizer_runs_the_step_too():
    model, optimizer, handle = trained(SAM, steps=0, lr=0.1)
    for t in range(1, 4):
        random_gradients(model)
        optimizer.first_step()
        random_gradients(model)
        optimizer.second_step()
        assert handle.step_count == t
        assert_guarantee(model, handle)


class Lookahead(torch.optim.Optimizer):
    """Around an optimizer: after each step the parameters go half of the way back."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})

    def step(self):
        before = [p.detach().clone() for g in self.param_groups for p in g["params"]]
        self.optimizer.step()
        for p, old in zip((p for g in self.param_groups for p in g["params"]), before, strict=True):
            p.data.lerp_(old, 0.5)


def test_an_optimizer_put_around_the_attached_one_is_refused_and_can_be_attached():
    model, optimizer, handle = trained()
    outer = Lookahead(optimizer)
    random_gradients(model)
    with pytest.raises(OptimizerError, match="received Lookahead"):
        outer.step()
    handle.remove()
    handle = attach_manifold_step(outer, model)
    for t in range(1, 4):
        random_gradients(model)
        outer.step()
        assert handle.step_count == t
        assert_guarantee(model, handle)


class Twice(torch.optim.SGD):
    """Its step calls that of its parent, so that hooks run twice."""

    def step(self, closure=None):
        super().step(closure)


def test_hooks_that_run_twice_count_once():
    torch.manual_seed(0)
    plain = make_model()
    torch.optim.SGD(plain.parameters(), lr=0.1)  # now torch has put hooks into the step of the parent, too
    nested = copy.deepcopy(plain)
    for model, optimizer_class in ((plain, torch.optim.SGD), (nested, Twice)):
        torch.manual_seed(1)
        optimizer = optimizer_class(model.parameters(), lr=0.1)
        handle = attach_manifold_step(optimizer, model)
        for _ in range(3):
            random_gradients(model)
            optimizer.step()
            assert_guarantee(model, handle)
        assert handle.step_count == 3
    for key, value in plain.state_dict().items():
        assert torch.equal(value, nested.state_dict()[key]), key


def test_another_optimizer_over_the_same_factors_is_refused():
    model, _optimizer, handle = trained()
    other = torch.optim.AdamW(model.parameters(), lr=0.1)
    random_gradients(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptimizerError, match=r"received AdamW, which has none.*attach_manifold_step"):
        other.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.optim.AdamW(model.dense.parameters(), lr=0.1).step()
    handle.remove()
    other.step()


def test_a_copied_optimizer_is_refused():
    model, optimizer, _ = trained()
    copied, other = copy.deepcopy((model, optimizer))
    random_gradients(copied)
    with pytest.raises(OptimizerError, match="received SGD, which has lost it, as a copy does"):
        other.step()
    handle = attach_manifold_step(other, copied)
    other.step()
    assert_guarantee(copied, handle)
    random_gradients(model)
    optimizer.step()


def test_wrappers_that_run_no_hooks_are_refused():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, optimizer.state

        def step(self):
            self.optimizer.step()

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for wrong in (Wrapper(optimizer), object()):
        with pytest.raises(OptimizerError, match=r"must be a torch\.optim\.Optimizer whose step runs hooks"):
            attach_manifold_step(wrong, model)


# ----------------------------------------------------------------------------------------------------- after errors


PLACES = [
    *("bases._inverse_factor", "cores.clamp_singular_values", "stack.Stack._write", "stack.Stack._values"),
    *("stack.Stack.end_interval", "stack.checksums", "factor_stacks.basis_stacks", "stack.Stack._write_gradients"),
]


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("call", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("place", PLACES)
def test_the_handle_goes_on_after_an_interrupt(place, call, interval, monkeypatch):
    model, optimizer, handle = trained(steps=1, lr=0.05, projection_interval=interval)
    model.b.V.grad = None  # stacks are made anew
    owner, _, name = place.rpartition(".")
    module, _, owner = owner.partition(".")
    target = f"hf_condlr.manifold.{module}" + (f".{owner}" if owner else "")
    with monkeypatch.context() as patch:
        original, count = getattr(resolve_name(target), name), [0]

        def interrupted(*args, **kwargs):
            count[0] += 1
            if count[0] == call:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        patch.setattr(f"{target}.{name}", interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            for _ in range(3):
                random_gradients(model)
                model.b.V.grad = None
                optimizer.step()
    for _ in range(2):
        random_gradients(model)
        optimizer.step()
    handle.settle()
    assert_guarantee(model, handle)
    assert np.isfinite([*handle.state_dict()["initial_condition"].values()]).all()


def test_the_handle_goes_on_after_factors_that_were_not_finite():
    model, optimizer, handle = trained()
    sound = copy.deepcopy(model.state_dict())
    model.a.U.data[0, 0] = torch.nan
    for _ in range(2):
        random_gradients(model)
        with pytest.raises(ConditioningError, match="factors must be finite; received NaN or inf in a"):
            optimizer.step()
    model.load_state_dict(sound)
    optimizer.step()
    assert_guarantee(model, handle)
    assert orthonormality_error(Net().a.weight.detach()) > 0  # other models are not looked at
