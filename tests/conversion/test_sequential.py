"""Sequential calibration: the closed form, and what layers behind compressed ones read."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from hf_condlr import CondLRConfig, condition_report, get_robust_lowrank_model
from hf_condlr.conversion import convert
from hf_condlr.conversion.calibration import calibration_batch
from hf_condlr.conversion.measuring import input_covariances
from hf_condlr.conversion.sequential import Inputs, corrected_weight, runs_in_blocks, sequential_inputs
from hf_condlr.conversion.spectra import activation_aware, fisher
from hf_condlr.conversion.stages import find_chains
from hf_condlr.errors import CondLRError, ConfigError, ConversionError
from hf_condlr.layers import LowRankLinear, replace_modules
from tests.conversion.calibration_data import batches, make_bert
from tests.conversion.conversions import snapshot
from tests.conversion.test_architectures import build
from tests.conversion.test_calibration import PAIRS, pair_batch

RANK = {"rank_ratio": 0.5, "tau": "inf"}


def moments(X, seen):
    return seen.T @ seen / len(X), (X - seen).T @ seen / len(X)


def samples(n, N=400, directions=None):
    """x, and x̂ = x M + noise, in `directions` of the n dimensions only."""
    generator = np.random.default_rng(0)
    X = generator.standard_normal((N, n)) * np.logspace(0, -1, n)
    seen = X @ (np.eye(n) + 0.2 * generator.standard_normal((n, n))) + 0.1 * generator.standard_normal((N, n))
    if directions is not None:
        basis = np.linalg.qr(generator.standard_normal((n, directions)))[0]
        seen = seen @ basis @ basis.T
    return X, seen


@pytest.mark.parametrize("directions", [None, 5])
@pytest.mark.parametrize("m", [7, 12, 30])
def test_the_corrected_weight_solves_the_ridge_regression_singular_inputs_included(m, directions):
    """min Σ ‖W x − A x̂‖²/N + λ‖W − A‖² as a least-squares problem with the rows √λ I below x̂/√N."""
    n, ridge = 12, 0.01
    X, seen = samples(n, directions=directions)
    W = np.random.default_rng(1).standard_normal((m, n))
    C, E = moments(X, seen)
    damping = np.sqrt(ridge * np.trace(C) / n) * np.eye(n)
    rows = np.concatenate([seen / np.sqrt(len(X)), damping])
    expected = np.linalg.lstsq(rows, np.concatenate([X @ W.T / np.sqrt(len(X)), damping @ W.T]), rcond=None)[0].T
    found = corrected_weight(*map(torch.tensor, (W, C, E)), ridge=ridge)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("with_fisher", [False, True])
@pytest.mark.parametrize("m", [7, 12, 30])
def test_the_factors_solve_the_reduced_rank_regression(m, with_fisher):
    """min over rank r of E‖F̃^{1/2}(W x − Ŵ x̂)‖²: the fitted outputs projected onto their first singular vectors."""
    n, r = 12, 4
    X, seen = samples(n)
    generator = np.random.default_rng(1)
    W, G = generator.standard_normal((m, n)), generator.standard_normal((50, m))
    F = G.T @ G / 50
    root = np.linalg.cholesky(F + np.trace(F) / m * np.eye(m)) if with_fisher else np.eye(m)
    targets = X @ W.T @ root
    fitted = seen @ np.linalg.lstsq(seen, targets, rcond=None)[0]
    V = np.linalg.svd(fitted, full_matrices=False)[2][:r].T
    optimum = np.linalg.norm(targets - fitted @ V @ V.T)

    C, E = map(torch.tensor, moments(X, seen))
    A = corrected_weight(torch.tensor(W), C, E, ridge=0.0)
    U, S, V = fisher(A, r, C, torch.tensor(F)) if with_fisher else activation_aware(A, r, C)
    assert np.linalg.norm(targets - seen @ (U @ S @ V.mT).numpy().T @ root) == pytest.approx(optimum, rel=1e-6)


def test_the_sums_are_exact_under_autocast():
    X, seen = torch.randn(2, 60, 7)
    found = []
    for enabled in (False, True):
        sums = Inputs(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for rows in zip(X.split(25), seen.split(25), strict=True):
                sums.add(*rows)
        found.append(sums.means(["layer"]))
    for exact, again in zip(*found, strict=True):
        assert torch.equal(exact, again)
    torch.testing.assert_close(found[0][1], (X - seen).mT @ seen / 60)


def test_the_weight_is_its_own_target_where_the_inputs_are_the_dense_ones():
    W, X = torch.randn(5, 7), torch.randn(3, 7)
    C = X.mT @ X
    assert torch.equal(corrected_weight(W, C, torch.zeros(7, 7)), W)
    assert torch.equal(corrected_weight(W, 0 * C, torch.zeros(7, 7)), W)


def read(model, name, data, mask=lambda batch, x: None):
    rows = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    with torch.no_grad():
        for batch in data:
            model(**batch) if isinstance(batch, dict) else model(batch)
    hook.remove()
    kept = [x if (m := mask(batch, x)) is None else x[m] for batch, x in zip(data, rows, strict=True)]
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in kept]).double()


def half(dense):
    return LowRankLinear.from_dense(dense, max(1, min(dense.weight.shape) // 2), tau=1e9)


class Skips(nn.Module):
    """Blocks that read what an earlier one put out, and a layer before them: no chain."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        a = self.blocks[0](self.first(x))
        b = self.blocks[1](a)
        return self.last(self.blocks[2](b + a))


def tokens(batch, x):
    return batch["attention_mask"].bool()


def causal(case):
    model, inputs = build(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + 9 * (parameter.dim() > 1)
    return model, [{"input_ids": inputs["input_ids"] + i} for i in range(3)]


def models():
    torch.manual_seed(0)
    yield "BERT", make_bert().eval(), batches(), tokens
    for case in ("Qwen2", "Gemma", "OPT"):
        yield case, *causal(case), lambda batch, x: None
    yield "skips", Skips(), [torch.randn(5, 6) for _ in range(3)], lambda batch, x: None
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    yield "sequential", plain, [torch.randn(5, 6) for _ in range(3)], lambda batch, x: None


CASES = {name: case for name, *case in models()}


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_those_behind_the_layers_replaced_so_far(case):
    """Against a model that is converted up to each layer and run as a whole."""
    model, data, mask = CASES[case]
    if case == "BERT":
        data = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in data]
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "classifier" not in name]
    names = [name for name in names if "lm_head" not in name and "pooler" not in name]
    before = snapshot(model)
    layers, seen, checked = {}, copy.deepcopy(model), []
    for group, C, E in sequential_inputs(model, names, data, layers):
        assert [id(m) for m in model.modules()] == [key[1] for key in before[0]]
        for name in group:
            x, x_hat = read(model, name, data, mask), read(seen, name, data, mask)
            torch.testing.assert_close(C.double(), x_hat.mT @ x_hat / len(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(E.double(), (x - x_hat).mT @ x_hat / len(x), rtol=1e-4, atol=1e-5)
            checked.append(name)
        for name in group:
            layers[model.get_submodule(name)] = half(model.get_submodule(name))
            replace_modules(seen, {seen.get_submodule(name): layers[model.get_submodule(name)]})
    assert sorted(checked) == sorted(names)
    assert E.norm() > 1e-2 * C.norm()  # the last one is behind layers that lost half of their rank


def test_each_side_of_an_encoder_decoder_counts_its_own_tokens():
    """Source and target of equal length, each with padding of its own; nothing is compressed yet."""
    model, batch = pair_batch("BART")
    own, reads_encoder = PAIRS["BART"]
    expected = input_covariances(model, PAIRS["BART"], [batch])
    names = [own, reads_encoder]
    found = {name: C for group, C, _ in sequential_inputs(model, names, [batch], {}) for name in group}
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def chains_of(model, data):
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return find_chains(model, names, calibration_batch(model, data))[0]


def test_blocks_are_a_chain_and_layers_that_read_the_same_tensor_a_group():
    model, inputs = build("Qwen2")
    blocks, head = chains_of(model, inputs)
    assert [stage.module for stage in blocks.stages] == list(model.model.layers)
    parts = [[name.rpartition(".")[2].split("_")[0] for name in group] for group in blocks.stages[1].groups]
    assert parts == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    assert head.stages[0].module is model and head.stages[0].groups == [["lm_head"]]


def test_blocks_that_read_earlier_ones_are_no_chain():
    model = Skips()
    found = chains_of(model, torch.randn(5, 6))
    assert [chain.stages[0].module for chain in found] == [model, *(block[0] for block in model.blocks), model]


def test_what_runs_in_blocks():
    def in_blocks(model, data):
        names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        return runs_in_blocks(model, names, [data])

    for case in ("Qwen2", "DINOv2", "MPNet"):
        assert in_blocks(*build(case)), case
    assert not in_blocks(*build("ALBERT"))  # layers run several times
    assert not in_blocks(*build("BART"))  # the encoder's output is read by every block of the decoder


class Counts(nn.Module):
    """A block with a state: a cache of what it saw."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(8, 8), 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x) * self.calls


def test_blocks_with_a_state_are_no_chain():
    model = nn.Sequential(Counts(), Counts())
    (chain,) = chains_of(model, torch.randn(5, 8))
    assert chain.stages[0].module is model and chain.stages[0].groups == [["0.linear"], ["1.linear"]]


@pytest.mark.parametrize("start", ["activation_aware", "fisher"])
@pytest.mark.parametrize("case", ["Qwen2", "BART"])
def test_outputs_stay_nearer_to_the_dense_ones(case, start):
    """Measured: the error falls by a tenth to a third."""
    model, inputs = build(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1 + 4 * (parameter.dim() > 1)
    data = [inputs | {"input_ids": (inputs["input_ids"] * k) % 40} for k in range(1, 12)]
    errors = []
    for sequential in (False, True):
        config = CondLRConfig(**RANK, init_weights=start, sequential_calibration=sequential)
        factored = get_robust_lowrank_model(copy.deepcopy(model), config, calibration_data=data)
        with torch.no_grad():
            errors.append(sum((factored(**b).logits - model(**b).logits).square().sum().item() for b in data))
    assert errors[1] < 0.95 * errors[0]


def test_what_reads_the_batch_itself_starts_as_without_the_option():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    data = [torch.randn(20, 6)]
    first = []
    for sequential in (False, True):
        config = CondLRConfig(**RANK, init_weights="activation_aware", sequential_calibration=sequential)
        layer = get_robust_lowrank_model(copy.deepcopy(model), config, calibration_data=data)[0]
        first.append(layer.U @ layer.S @ layer.V.mT)
    torch.testing.assert_close(first[1], first[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("start", ["activation_aware", "fisher"])
def test_a_conditioned_start_obeys_the_bound(start):
    config = CondLRConfig(r=6, tau=0.5, init_weights=start, sequential_calibration=True, conditioned_start=True)
    model = get_robust_lowrank_model(make_bert(), config, calibration_data=batches())
    assert all(layer.condition_number <= 1.5 * (1 + 1e-4) for layer in condition_report(model).layers)


def test_after_an_error_half_way_the_model_is_as_it_was(monkeypatch):
    model = make_bert().train()
    before, made = snapshot(model), []

    def fails(dense, name, *args):
        made.append(name)
        if len(made) == 8:
            raise ConversionError("a rule", received="a value", remedy="A remedy.")
        return factored(dense, name, *args)

    factored = convert._factored
    monkeypatch.setattr(convert, "_factored", fails)
    config = CondLRConfig(r=4, init_weights="fisher", sequential_calibration=True)
    with pytest.raises(CondLRError, match="a rule"):
        get_robust_lowrank_model(model, config, calibration_data=batches())
    after = snapshot(model)
    assert after[0] == before[0] and after[2] == before[2]
    assert all(torch.equal(a[-1], b[-1]) and a[:3] == b[:3] for a, b in zip(after[1], before[1], strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_that_run_several_times_are_refused_by_name():
    model, inputs = build("ALBERT")
    config = CondLRConfig(r=4, init_weights="activation_aware", sequential_calibration=True)
    with pytest.raises(ConversionError, match=r"called once in a forward pass.*query.* called 2 times"):
        get_robust_lowrank_model(model, config, calibration_data=[inputs])


@pytest.mark.parametrize("start", ["svd", "randomized_svd", "orthogonal"])
def test_a_start_that_looks_at_no_data_is_refused(start):
    with pytest.raises(ConfigError, match=f"sequential_calibration must be false with init_weights='{start}'"):
        CondLRConfig(r=4, init_weights=start, sequential_calibration=True)
