"""The speed benchmarks at a size that takes moments: they run, print every row and write a record. Never times."""

import json
import sys

import pytest
import torch

from tests.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
TINY = ["--batch_size", "2", "--tokens", "8"]


@pytest.fixture(scope="module", autouse=True)
def importable():
    """The scripts import one another by their bare names."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    def run(module, *options):
        """Rows of the tables that `main` prints, without their header, and the record."""
        output = tmp_path / "record.json"
        monkeypatch.setattr(sys, "argv", [module.__name__, *options, "--threads", "1", "--output", str(output)])
        module.main()
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
        rules = [i for i, line in enumerate(lines) if line[0] == "---"]
        record = json.loads(output.read_text())
        assert module.__name__ in record["command"] and record["versions"]["torch"] == torch.__version__
        return [
            line for i, line in enumerate(lines) if len(line) > 1 and i not in {j - 1 for j in rules} | set(rules)
        ], record

    return run


def test_training_step(run):
    import training_step

    rows, record = run(
        training_step, "--models", "tiny", *TINY, "--rounds", "2", "--projection_interval", "2", "--memory", "false"
    )
    assert [row[:2] for row in rows] == [["tiny, 16 tokens", m] for m in ("dense", "low rank", "LoRA", "CondLR")]
    assert rows[1][3] == rows[0][4] == "1.00 (1.00 … 1.00)"
    assert {len(times) for times in record["results"]["tiny"]["seconds"].values()} == {2}


def test_training_step_sees_what_a_step_holds_at_its_peak(monkeypatch):
    """Not what was held in between before it. Arrays of this size are no longer held once they are freed."""
    import training_step

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
    import training_step

    options = training_step.Options(batch_size=2, tokens=4, lora_rank=2)
    steps = {m: training_step.Step(m, "tiny", options, torch.device("cpu")) for m in training_step.METHODS}
    names = {m: {n for n, p in s.model.named_parameters() if p.requires_grad} for m, s in steps.items()}
    assert all("lora_" in name or name.startswith("classifier") for name in names["LoRA"])
    assert len([name for name in names["LoRA"] if "lora_" in name]) == 2 * len(
        training_step.linear_names(steps["dense"].model)
    )
    assert names["low rank"] == names["CondLR"]
    weights = {
        m: sum(p.numel() for n, p in s.model.named_parameters() if "layer" in n and p.dim() == 2)
        for m, s in steps.items()
    }
    assert 0.35 < weights["CondLR"] / weights["dense"] < 0.41


@pytest.mark.parametrize("compiler", ["none", "broken"])
def test_inference(run, monkeypatch, compiler):
    import inference

    def broken(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nfound")

    monkeypatch.setattr(torch, "compile", broken)
    options = ["--model", "tiny", "--batch_sizes", "1", "32", "--tokens", "4", "--compression_ratios", "0.4", "0.75"]
    rows, record = run(inference, *options, "--rounds", "2", "--compiled", str(compiler == "broken"))
    expected = [
        [part, batch, removed, form]
        for part in ("linear layers", "whole model")
        for batch in ("1", "32")
        for removed in ("40%", "75%")
        for form in ("three factors", "folded")
    ]
    assert [row[:4] for row in rows] == expected
    assert record["why_no_compiler"] == ("RuntimeError: no C++ compiler" if compiler == "broken" else "not asked for")


def test_inference_limit_is_that_of_the_formula():
    import inference

    dense = inference.build("tiny")
    forms = inference.Forms(dense, 0.6, 4, False)
    limits = forms.limits(forms.linear["dense"].rows(5, torch.empty(0)))
    converted = forms.whole["three factors"].condlr.report.converted.values()
    assert all(layer.r % 4 == 0 for layer in converted)
    total = sum(m * n for m, n in (layer.shape for layer in converted))
    folded = sum(layer.r * sum(layer.shape) for layer in converted)
    assert limits["folded"] == pytest.approx(total / folded)
    assert limits["three factors"] == pytest.approx(total / sum(layer.parameters for layer in converted))


def test_scaling(run):
    import scaling

    sizes = ["--ranks", "4", "8", "--widths", "16", "32", "--numbers", "1", "2"]
    rows, record = run(scaling, "--width", "32", "--rank", "8", "--layers", "2", *sizes, "--rounds", "2")
    labels = ["rank r", "width m = n", "layers"]
    points = [
        [label, size]
        for label, pair in zip(labels, (("4", "8"), ("16", "32"), ("1", "2")), strict=True)
        for size in pair
    ]
    assert [row[:2] for row in rows[:6]] == points
    assert [[row[0], row[2]] for row in rows[6:]] == [["rank r", "2.00"], ["width m = n", "1.00"], ["layers", "1.00"]]
    assert record["results"]["rank"]["operations"] == [2 * 8 * 64 * 16, 2 * 8 * 64 * 64]
    assert scaling.slope([1, 2, 4], [3, 24, 192]) == pytest.approx(3)


def test_profile_step(run):
    import profile_step

    rows, record = run(profile_step, "--model", "tiny", *TINY, "--steps", "1")
    parts = [
        "projection",
        "Cholesky of the retraction",
        "conditioning",
        "copies",
        "checks and Python",
        "floor: the bare products",
    ]
    assert [row[0] for row in rows] == ["forward", "backward", "optimizer", "manifold step", *(f"– {p}" for p in parts)]
    [seconds] = record["seconds"]
    assert all(seconds[part] > 0 for part in (*parts, "forward", "backward", "optimizer"))
    assert sum(seconds[part] for part in parts[:5]) == pytest.approx(seconds["manifold step"])
