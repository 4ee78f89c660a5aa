"""The speed benchmarks at a size that takes moments: they run, print every row and write a record. Never times."""

import importlib.metadata
import json
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as verbosity

from benchmarks import (
    conversion,
    generation,
    inference,
    loading,
    long_run,
    manifold_step,
    models,
    profile_step,
    projection_interval,
    timing,
    training_step,
)

TINY = ["--batch_size", "2", "--tokens", "8"]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    def run(module, *options):
        """Rows of the tables that a benchmark prints, without their header, and the record."""
        output = tmp_path / "record.json"
        monkeypatch.setattr(sys, "argv", [module.__name__, *options, "--threads", "1", "--output", str(output)])
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", module.__spec__)  # as `python -m` does
        timing.run(module.Options, module.measure, module.table)
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
        rules = [i for i, line in enumerate(lines) if line[0].startswith("---")]
        record = json.loads(output.read_text())
        assert record["command"].startswith(f"python -m {module.__name__} ")
        assert record["versions"]["torch"] == importlib.metadata.version("torch")
        return [
            line for i, line in enumerate(lines) if len(line) > 1 and i not in {j - 1 for j in rules} | set(rules)
        ], record["results"]

    level = verbosity.get_verbosity()
    yield run
    verbosity.set_verbosity(level)  # the benchmarks silence transformers
    verbosity.enable_progress_bar()


def test_generation(run, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    folder = tmp_path / "model"
    LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=1, **sizes)).save_pretrained(folder)
    options = ["--model", str(folder), "--compression_ratios", "0.5", "--rounds", "2", "--prompt", "6"]
    rows, results = run(generation, *options, "--new_tokens", "3", "--rank_multiple", "1")
    assert [row[:2] for row in rows] == [[size, m] for size in "18" for m in ("dense", "50 % removed")]
    assert results[0]["prompt limit"] == results[0]["decoding limit"] == 1
    assert 1.9 < results[1]["prompt limit"] < 2.2  # the blocks have half of their weights
    assert 1 < results[1]["decoding limit"] < results[1]["prompt limit"]  # the head is read whole
    assert len(results[1]["decoding speedup"]) == 2


def test_training_step(run):
    rows, results = run(
        training_step, "--models", "tiny", *TINY, "--rounds", "2", "--memory", "false", "--intervals", "1", "4"
    )
    assert [row[:2] for row in rows] == [
        ["tiny, 16 tokens", m] for m in ("dense", "low rank", "LoRA", "CondLR", "CondLR, k = 4")
    ]
    assert rows[1][3] == rows[0][4] == "1.00 (1.00 … 1.00)"
    assert {len(times) for times in results["tiny"]["seconds"].values()} == {2}


def test_training_step_sees_what_a_step_holds_at_its_peak(monkeypatch):
    """Not what was held in between before it. Arrays of this size are no longer held once they are freed."""

    class Step:
        def __init__(self, *args):
            torch.ones(2**27)  # 512 MB

        def __call__(self):
            torch.ones(2**26)

    monkeypatch.setattr(training_step, "Step", Step)
    options = training_step.Options(threads=1)
    peak = training_step.peak_memory("dense", "tiny", options)
    if sys.platform == "linux" and not torch.cuda.is_available():
        assert peak == pytest.approx(4 * 2**26, rel=0.1)


def test_training_step_trains_the_parameters_of_each_method():
    options = training_step.Options(batch_size=2, tokens=4)
    steps = {m: training_step.Step(m, "tiny", options, torch.device("cpu")) for m in options.methods}
    names = {m: {n for n, p in s.model.named_parameters() if p.requires_grad} for m, s in steps.items()}
    assert all("lora_" in name or name.startswith("classifier") for name in names["LoRA"])
    assert len([name for name in names["LoRA"] if "lora_" in name]) == 2 * len(
        models.linear_names(steps["dense"].model)
    )
    assert names["low rank"] == names["CondLR"]
    weights = {
        m: sum(p.numel() for n, p in s.model.named_parameters() if "layer" in n and p.dim() == 2)
        for m, s in steps.items()
    }
    assert 0.35 < weights["CondLR"] / weights["dense"] < 0.41


@pytest.mark.parametrize("compiler", ["none", "broken"])
def test_inference(run, monkeypatch, compiler):
    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(torch, "compile", broken)
    options = ["--model", "tiny", "--batch_sizes", "1", "32", "--tokens", "4", "--compression_ratios", "0.4", "0.75"]
    rows, results = run(inference, *options, "--rounds", "2", "--compiled", str(compiler == "broken"))
    expected = [
        [part, batch, removed, form]
        for part in ("linear layers", "whole model")
        for batch in ("1", "32")
        for removed in ("40%", "75%")
        for form in ("three factors", "folded", "pivoted")
    ]
    assert [row[:4] for row in rows] == expected
    assert results["why_no_compiler"] == ("RuntimeError: no C++ compiler" if compiler == "broken" else "not asked for")


def test_inference_limit_is_that_of_the_formula():
    dense = models.build("tiny")
    forms = inference.Forms(dense, 0.6, 4, False)
    limits = forms.limits(forms.linear["dense"].rows(5, torch.empty(0)))
    converted = forms.whole["three factors"].condlr.report.converted.values()
    assert all(layer.r % 4 == 0 for layer in converted)
    total = sum(m * n for m, n in (layer.shape for layer in converted))
    folded = sum(layer.r * sum(layer.shape) for layer in converted)
    assert limits["folded"] == pytest.approx(total / folded)
    pivoted = folded - sum(layer.r**2 for layer in converted)
    assert limits["pivoted"] == pytest.approx(total / pivoted)
    assert limits["three factors"] == pytest.approx(total / sum(layer.parameters for layer in converted))


def test_profile_step(run):
    rows, results = run(profile_step, "--models", "tiny", *TINY, "--rounds", "1")
    parts = ["matrix products", "factorisations", "copies", "elementwise, checks and Python"]
    labels = [f"– {part}" for part in (*parts, "floor: the bare products")]
    assert [row[0] for row in rows] == ["forward", "backward", "optimizer", "manifold step", *labels]
    [[seconds]] = results.values()
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds[part] for part in parts) == pytest.approx(seconds["manifold step"])


def test_manifold_step(run):
    rows, results = run(manifold_step, "--models", "tiny", "--rounds", "1", "--conditioning", "true")
    assert [row[0] for row in rows] == list(results["tiny, rank ratio 0.2"]["seconds"])
    assert len(rows) == 8 and rows[0][3] == "1.00 ×"
    assert 1 < results["tiny, rank ratio 0.2"]["copies_of_factors"] < 5


def test_conversion(run):
    options = ["--models", "tiny", "--samples", "4", "--batch_size", "2", "--tokens", "8", "--starts", "svd", "fisher"]
    rows, results = run(conversion, *options)
    assert [row[0] for row in rows] == ["tiny, svd", "tiny, fisher"]
    assert [results[row[0]]["passes"] for row in rows] == [0, 1]
    assert 0 < results["tiny, fisher"]["in_passes"] < results["tiny, fisher"]["seconds"]


def test_conversion_counts_operations_of_llamas(run):
    rows, results = run(conversion, "--llamas", "7B", "--samples", "256", "--tokens", "2048")
    assert [row[0] for row in rows] == ["7B, activation_aware", "7B, fisher"]
    found = results["formula"]["7B, fisher"]
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert found["weights"] == weights == pytest.approx(6.5e9, rel=0.01)
    assert 4 * weights * 256 * 2048 < found["float32"] < 10 * weights * 256 * 2048


def test_projection_interval(run):
    options = ["--intervals", "1", "4", "--learning_rates", "0.003", "--seeds", "0", "1", "--epochs", "1"]
    rows, results = run(projection_interval, *options)
    assert [row[:2] for row in rows] == [
        ["1", "0.003"],
        ["4", "0.003"],
        *([k, rows[i][1]] for i, k in ((2, "1"), (3, "4"))),
    ]
    jumps = {row["label"]: row["jump"] for row in results["rows"]}
    assert 0 < jumps["1"] < jumps["4"]
    assert all(row["kappa"] <= 1.1 * (1 + 1e-4) for row in results["rows"])


def test_long_run(run, tmp_path):
    picture = tmp_path / "picture.png"
    rows, results = run(long_run, "--steps", "20", "--window", "5", "--warmup_steps", "8", "--picture", str(picture))
    assert [row[0] for row in rows] == ["5", "10", "15", "20"]
    assert all(row["orthonormality_error"] < 1e-5 and row["kappa_excess"] < 1e-4 for row in results)
    assert picture.stat().st_size > 10_000


@pytest.mark.processes
def test_loading(run):
    rows, results = run(loading, "--model", "tiny", "--rounds", "1")
    assert [row[0] for row in rows] == ["import hf_condlr", "first load", "load", "load and read"]
    assert len(results["import"]["package"]) == 2
    assert {form: len(times) for form, times in results["load"].items()} == {"dense": 1, "factored": 1}
