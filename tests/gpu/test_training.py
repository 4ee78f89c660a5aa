"""Training on a GPU: the guarantee after steps under each optimizer and precision, and that the host never waits."""

import copy

import pytest
import torch
from torch import nn

from hf_condlr import attach_manifold_step
from tests.manifold.nets import (
    OPTIMIZERS,
    assert_guarantee,
    layers_of,
    make_model,
    make_model_of_all_tolerances,
    random_gradients,
)


def batch(device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 2, 5, 5, generator=generator), torch.randint(0, 3, (8,), generator=generator)
    return x.to(device), y.to(device)


def backward(model, device, seed=0):
    x, y = batch(device, seed)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_guarantee_under_every_optimizer(device, optimizer):
    model = make_model_of_all_tolerances().to(device)
    made = OPTIMIZERS[optimizer](list(model.parameters()), 0.05)
    handle = attach_manifold_step(made, model, warmup_steps=5)
    for _ in range(10):
        random_gradients(model)
        made.step()
    handle.check()
    assert_guarantee(model, handle)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_guarantee_under_8_bit_optimizers(cuda, name):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = make_model().to(cuda)
    made = getattr(bitsandbytes.optim, name)(model.parameters(), lr=0.01, min_8bit_size=1)
    handle = attach_manifold_step(made, model)
    for _ in range(10):
        random_gradients(model)
        made.step()
    handle.check()
    assert_guarantee(model, handle)


@pytest.mark.parametrize("fused", [False, True])
def test_the_step_does_not_make_the_host_wait(device, no_waiting, fused):
    """After the first step, which decomposes and uploads; the flags are read by `check`, which waits."""
    model = make_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, foreach=not fused, fused=fused)
    handle = attach_manifold_step(optimizer, model)
    for step in range(4):
        random_gradients(model)
        if step < 2:
            optimizer.step()
            continue
        with no_waiting:
            optimizer.step()
    handle.check()
    assert_guarantee(model, handle)


def test_masked_factors_keep_their_values(device):
    model = make_model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach_manifold_step(optimizer, model)
    random_gradients(model)
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    random_gradients(model)
    model.a.U.grad[0, 0] = torch.nan
    optimizer.step()
    assert torch.equal(model.state_dict()["a.U"], before["a.U"])
    assert not torch.equal(model.state_dict()["b.U"], before["b.U"])
    assert_guarantee(model, handle)


@pytest.mark.gpu
def test_the_steps_of_gpu_and_cpu_agree(cuda):
    """20 steps of AdamW. W differs by what clips by products differ from those by eigh, 1e-3."""
    torch.manual_seed(1)
    models = {"cpu": make_model()}
    models["cuda"] = copy.deepcopy(models["cpu"]).to(cuda)
    gradients = [[torch.randn_like(p) for p in models["cpu"].parameters()] for _ in range(20)]
    for device, model in models.items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        attach_manifold_step(optimizer, model)
        for step in gradients:
            for p, gradient in zip(model.parameters(), step, strict=True):
                p.grad = gradient.to(device)
            optimizer.step()
    for name, layer in layers_of(models["cuda"]).items():
        expected = layers_of(models["cpu"])[name].to_dense().weight
        assert (layer.to_dense().weight.cpu() - expected).norm() <= 2e-3 * expected.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_guarantee_under_autocast(device, dtype):
    model = make_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = attach_manifold_step(optimizer, model)
    for step in range(5):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            backward(model, device, step)
            optimizer.step()  # inside of autocast, too, the step computes in float32
    handle.check()
    assert_guarantee(model, handle)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_and_goes_on(device, fused):
    """Scaled gradients that overflow move nothing; then the scale falls and training goes on."""
    model = make_model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    handle = attach_manifold_step(optimizer, model)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=100)
    before = copy.deepcopy(model.state_dict())
    for step in range(4):
        optimizer.zero_grad()
        x, y = batch(device, step)
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if step == 0:
            model.a.U.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        if step == 0:
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert scaler.get_scale() == 2.0**9
    assert handle.step_count == 3
    handle.check()
    assert_guarantee(model, handle)


@pytest.mark.gpu
def test_forward_and_backward_replayed_from_a_cuda_graph(cuda):
    """Forward and backward as one graph with static gradients, and the step outside of it."""
    model = make_model().to(cuda)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, capturable=True)
    handle = attach_manifold_step(optimizer, model)
    x, y = batch(cuda)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=False)
    with torch.cuda.graph(graph):
        for p in model.parameters():
            p.grad.zero_()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
    losses = []
    for _ in range(10):
        graph.replay()
        optimizer.step()
        losses.append(loss.item())
    handle.check()
    assert_guarantee(model, handle)
    assert losses[-1] < losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_training_of_a_compiled_model(cuda, mode):
    model = make_model().to(cuda)
    compiled = torch.compile(model, mode=mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    handle = attach_manifold_step(optimizer, model)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(backward(compiled, cuda).item())
        optimizer.step()
    handle.check()
    assert_guarantee(model, handle)
    assert losses[-1] < losses[0]
