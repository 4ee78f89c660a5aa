"""Settings that change the arithmetic of a training: autocast, skipped steps, recomputation, compilation, 8 bits."""

import copy
import math

import pytest
import torch
from torch import nn

from hf_condlr import CondLRTrainer, attach_manifold_step, condition_report
from hf_condlr.errors import OptimizerError
from hf_condlr.manifold.bases import BasisStack
from tests.manifold.test_step import assert_guarantee, layers_of, make_model
from tests.training.tiny import arguments, convert, dense_bert, text_data

FUSED = pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])


def batches(count, size=16):
    generator = torch.Generator().manual_seed(5)
    for _ in range(count):
        yield torch.randn(size, 2, 5, 5, generator=generator), torch.randint(0, 3, (size,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_half_precision_and_leaves_float32_factors(dtype):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = attach_manifold_step(optimizer, model, warmup_steps=5)
    for x, y in batches(10):
        with torch.autocast("cpu", dtype):
            outputs = model(x)
            loss = nn.functional.cross_entropy(outputs, y)
        assert outputs.dtype == dtype
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert_guarantee(model, handle)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@FUSED
def test_a_step_that_a_gradient_scaler_skips_leaves_factors_and_schedule(fused):
    """The loss overflows in float16 at the first scales; the bound tightens with the steps that are taken."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    handle = attach_manifold_step(optimizer, model, warmup_steps=8)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=5)
    skipped = taken = 0
    for x, y in batches(40):
        before = copy.deepcopy(model.state_dict()), handle.bounds(), handle.step_count
        with torch.autocast("cpu", torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped += 1
            weights, bounds, count = before
            assert handle.bounds() == bounds and handle.step_count == count
            assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
        else:
            taken += 1
            assert handle.step_count == taken
            assert_guarantee(model, handle)
    assert skipped > 3 and taken > 10
    moments = [m for state in optimizer.state.values() for m in state.values()]
    assert moments and all(torch.isfinite(torch.as_tensor(m)).all() for m in moments)


def test_a_half_precision_model_trains_with_float32_factors():
    """Its factors are their own float32 masters: autocast rounds copies of them in each pass."""
    model = make_model().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with pytest.raises(OptimizerError, match=r"must be float32 or float64.*or of each factored layer alone"):
        attach_manifold_step(optimizer, model)
    for layer in layers_of(model).values():
        layer.float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = attach_manifold_step(optimizer, model)
    for x, y in batches(5):
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert_guarantee(model, handle)
    assert model.dense.weight.dtype == torch.bfloat16


def test_rounded_factors_would_break_the_constraint():
    """Why they are refused: measured 2e-3 √r instead of 1e-5 √r, and κ = 1.103 instead of 1.1."""
    model = make_model(rank_ratio=1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    attach_manifold_step(optimizer, model)
    for x, y in batches(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    layer = model.a
    gram = layer.U.detach().bfloat16().double()
    error = torch.linalg.matrix_norm(gram.mT @ gram - torch.eye(layer.r, dtype=torch.float64)) / math.sqrt(layer.r)
    assert 1e-3 < error < 1e-2
    assert torch.linalg.cond(layer.S.detach().bfloat16().double()) > 1.1 * (1 + 1e-3)


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="of torch ≥ 2.9")
def test_a_setting_for_all_backends_is_off_inside_of_the_step_only():
    """And still reaches the backends afterwards. Kernels that obey it are not here: the guarantee is not at stake."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    for backend in backends:  # a test before may have set them, and they would no longer follow
        backend.fp32_precision = "none"
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_manifold_step(optimizer, model)
    seen = []
    project = BasisStack.project_gradients

    def watched(self, *args):
        seen.append({b.fp32_precision for b in backends})
        return project(self, *args)

    try:
        torch.backends.fp32_precision = "tf32"
        for x, y in batches(1):
            nn.functional.cross_entropy(model(x), y).backward()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BasisStack, "project_gradients", watched)
            optimizer.step()
        assert seen and all(values == {"ieee"} for values in seen)
        assert {b.fp32_precision for b in backends} == {"tf32"}
        torch.backends.fp32_precision = "ieee"
        assert {b.fp32_precision for b in backends} == {"ieee"}
    finally:
        torch.backends.fp32_precision = "none"


# --------------------------------------------------------------------------------------------- equal trainings


def trained(folder, model, rows, **options):
    trainer = CondLRTrainer(model=copy.deepcopy(model), args=arguments(folder, **options), train_dataset=rows)
    trainer.train()
    assert trainer.manifold_step.step_count == 12
    model = trainer.model
    return {name.removeprefix("_orig_mod."): p.detach() for name, p in model.named_parameters()}


def largest_difference(first, second):
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def test_gradient_checkpointing_and_compilation_train_as_plain(tmp_path):
    """12 float32 AdamW steps. Both run the same kernels: measured 0 (bit for bit) on a CPU."""
    model, rows = dense_bert(), text_data()
    del model.bert.encoder.layer[1:]  # compiling takes its time
    model = convert(model)
    plain = trained(tmp_path / "plain", model, rows)
    checkpointed = trained(tmp_path / "checkpointed", model, rows, activation_checkpointing=True)
    assert largest_difference(plain, checkpointed) <= 1e-6
    compiled = trained(tmp_path / "compiled", model, rows, torch_compile=True, torch_compile_backend="aot_eager")
    assert largest_difference(plain, compiled) <= 1e-6


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, while it compiles
def test_a_compiled_optimizer_step_takes_the_manifold_step_too():
    """Nothing of it is traced: a graph for each step number took 28 s. Measured difference: 0; 1.4e-6 with AdamW."""
    start, results = make_model(), []
    for backend in (None, "eager"):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        handle = attach_manifold_step(optimizer, model, warmup_steps=5)
        step = optimizer.step if backend is None else torch.compile(optimizer.step, backend=backend)
        for x, y in batches(12):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            step()
            assert_guarantee(model, handle)
        results.append(dict(model.named_parameters()))
    assert largest_difference(*results) <= 1e-6


# ------------------------------------------------------------------------------------------------------- 8 bits


class AdamW8bit(torch.optim.Optimizer):
    """What bitsandbytes' and torchao's do: moments kept as bytes, one scale for each block, parameters in float32."""

    BLOCK = 64

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    def quantized(self, moment):
        blocks = nn.functional.pad(moment.flatten(), (0, -moment.numel() % self.BLOCK)).view(-1, self.BLOCK)
        scale = blocks.abs().amax(1, keepdim=True).clamp_min(1e-12)
        return (blocks / scale * 127).ceil().to(torch.int8), scale  # up: a second moment of 0 would divide by nothing

    @staticmethod
    def restored(bits, scale, like):
        return (bits * scale / 127).flatten()[: like.numel()].view_as(like)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"], state["m"], state["root_v"] = 0, *(self.quantized(torch.zeros_like(p)) for _ in "mv")
                state["step"] += 1
                beta_1, beta_2 = group["betas"]
                m = self.restored(*state["m"], p).lerp(p.grad, 1 - beta_1)
                v = self.restored(*state["root_v"], p).square().lerp(p.grad.square(), 1 - beta_2)
                state["m"], state["root_v"] = self.quantized(m), self.quantized(v.sqrt())
                root = (v / (1 - beta_2 ** state["step"])).sqrt() + group["eps"]
                p.data.sub_(group["lr"] * m / (1 - beta_1 ** state["step"]) / root)  # torch counts no write to `.data`


def test_an_optimizer_with_8_bit_moments():
    model = make_model()
    optimizer = AdamW8bit(model.parameters(), lr=0.01)
    handle = attach_manifold_step(optimizer, model, warmup_steps=5)
    x = torch.randn(64, 2, 5, 5)
    y = (x.mean((1, 2, 3)) > 0).long()
    losses = []
    for step in range(1, 41):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        assert handle.step_count == step
        assert_guarantee(model, handle)
    assert losses[-1] < 0.9 * losses[0]
    assert optimizer.state[model.a.U]["m"][0].dtype == torch.int8


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize(
    ("package", "optim"),
    [
        ("bitsandbytes", "adamw_bnb_8bit"),
        ("bitsandbytes", "paged_lion_8bit"),
        ("torchao", "adamw_torch_8bit"),
        ("torchao", "adamw_torch_4bit"),
    ],
)
def test_real_ones_train_and_resume_where_they_are_installed(package, optim, tmp_path):
    pytest.importorskip(package)
    model, rows = convert(dense_bert()), text_data()
    args = arguments(tmp_path, optim=optim, save_strategy="steps", save_steps=3)
    weights = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        trainer = CondLRTrainer(model=copy.deepcopy(model), args=args, train_dataset=rows)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert condition_report(trainer.model).max_condition_number <= 1.1 * (1 + 1e-4)
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_optimizers_that_step_inside_backward_are_refused():
    """lomo_optim's have this method, and a `step` that does nothing."""

    class Lomo(torch.optim.SGD):
        def fused_backward(self, loss, lr):
            loss.backward()

    model = make_model()
    with pytest.raises(OptimizerError, match=r"must move parameters in step\(\), not while .*; received Lomo"):
        attach_manifold_step(Lomo(model.parameters(), lr=0.1), model)
