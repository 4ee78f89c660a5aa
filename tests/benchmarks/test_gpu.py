"""benchmarks/gpu: the whole command in smoke mode, its limits, and its counts against torch's counter."""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import manifold_step
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import cifar, environment, floors, tf32
from benchmarks.gpu.parts import PARTS, Part
from hf_condlr import LowRankLinear, attach_manifold_step
from tests.paths import ROOT


def baddbmm_operations(total, left, right, **unused):
    layers, m, k = left
    return 2 * layers * m * k * right[2]


IN_PLACE = {torch.ops.aten.baddbmm_: baddbmm_operations}  # torch counts only the one that makes a new tensor
SHAPES = [(48, 32, 8), (32, 32, 8), (32, 64, 12)]
MISSING = ("datasets", "evaluate", "foolbox", "pyautoattack")


def counted_step(shapes):
    """Operations of the products of one manifold step, the second: the first one decomposes."""
    layers = torch.nn.ModuleList(LowRankLinear(n, m, r, False) for m, n, r in shapes)
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.01)
    attach_manifold_step(optimizer, layers, metric_scaling=False)
    for _ in range(2):
        for p in layers.parameters():
            p.grad = torch.randn_like(p) / 10
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            optimizer.step()
    return counter.get_total_flops()


@pytest.mark.parametrize("ahead", [False, True])
def test_floor_of_the_step_is_what_torch_counts(monkeypatch, ahead):
    """On a CPU one product a core shows that it obeys its bound."""
    if ahead:
        monkeypatch.setattr("hf_condlr.manifold.masks.runs_ahead", lambda X: True)
    products = floors.products_of_the_clip() if ahead else 1
    expected = floors.basis_operations(SHAPES) + floors.core_operations(SHAPES, products)
    assert counted_step(SHAPES) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("factored", [False, True])
def test_floor_of_the_linear_layers_is_what_torch_counts(factored):
    m, n, r = 48, 32, 8
    rows = 100
    layer = LowRankLinear(n, m, r, False) if factored else torch.nn.Linear(n, m, False)
    x = torch.randn(rows, n, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    assert floors.linear_operations([(m, n, r)], rows, factored) == pytest.approx(counter.get_total_flops())


def test_floors_have_a_row_for_each_part():
    text = floors.table()
    assert all(model.name in text for model in floors.MODELS)
    assert manifold_step.rank_ratio_at("vit-b", 0.6) == pytest.approx(189 / 768)
    vit = floors.floors(floors.MODELS[0], 290)
    assert vit["step: bases, float32"] == pytest.approx(12 * 12 * 13824 * 189**2 / 67e12)
    assert vit["step: cores, 290 products in float64"] == pytest.approx(2 * 290 * 72 * 189**3 / 67e12)


def test_limits_share_what_is_left():
    assert gpu.limits([1.0, 3.0], 8.0) == 2.0
    assert sum(part.share for part in PARTS) == pytest.approx(9.7)


def test_a_part_is_killed_at_its_limit_and_its_record_kept(tmp_path, monkeypatch):
    program = tmp_path / "slow_part.py"
    program.write_text(
        "import json, pathlib, sys, time\n"
        "values = {'machine': 'one', 'table': 'half', 'command': 'it'}\n"
        "pathlib.Path(sys.argv[-1]).write_text(json.dumps(values))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    part = Part("environment", "Why?", "slow_part", 1.0, "", "")
    end = gpu.run_part(part, tmp_path, 5.0, False)
    assert end == "killed at its limit of 5 s"
    text = gpu.summary(tmp_path, {"environment": (end, 5.0)})
    assert "half" in text and end in text and gpu.NO_GPU in text


def test_outcomes_of_tests_are_read(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.gpu\ndef test_good(): pass\n"
        "@pytest.mark.gpu\ndef test_bad(): assert False\n"
        "@pytest.mark.gpu\ndef test_no(): pytest.skip('no')\n"
        "def test_other(): pass\n"
    )
    outcomes = environment.run_tests(str(tmp_path))
    assert sorted(outcomes.values()) == ["failed", "passed", "skipped"]
    assert outcomes[next(name for name in outcomes if "bad" in name)] == "failed"
    results = {"machine": {"packages": {}}, "rates": {}, "tests": outcomes}
    assert "1 failed, 1 passed, 1 skipped" in environment.table(results)


def test_augmentation_is_a_crop_and_perhaps_a_flip():
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    found = cifar.augmented(images, torch.Generator().manual_seed(0))
    padded = cifar.normalised(torch.nn.functional.pad(images, (4, 4, 4, 4)))
    for image, crop in zip(padded, found, strict=True):
        windows = [image[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        assert any(torch.equal(crop, w) or torch.equal(crop, w.flip(-1)) for w in windows)


def write_images(folder, split, count):
    """A parquet file of coloured squares in the form of the Hub's CIFAR-10."""
    import io

    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    cells = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.new("RGB", (32, 32), (25 * (i % 10), 100, 200)).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    rows = pyarrow.table({"image": cells, "label": [i % 10 for i in range(count)]})
    pyarrow.parquet.write_table(rows, folder / f"{split}.parquet")


@pytest.mark.processes
def test_smoke(tmp_path, monkeypatch):
    """The command, as on a GPU, with tiny sizes."""
    data = tmp_path / "cifar10"
    data.mkdir()
    for split, count in (("train", 16), ("test", 4)):
        write_images(data, split, count)
    monkeypatch.setenv("CONDLR_DATA", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    output = tmp_path / "out"
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "true", "--minutes", "60", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (output / "log.txt").read_text()[-3000:]
    files = {path.name for path in output.iterdir()}
    assert files == {*(f"{part.name}.json" for part in PARTS), "log.txt", "summary.md"}
    summary = (output / "summary.md").read_text()
    assert summary.count(", done, ") == len(PARTS)
    assert all(part.question in summary for part in PARTS)
    tests = json.loads((output / "environment.json").read_text())["results"]["tests"]
    assert len(tests) > 20
    if not torch.cuda.is_available():
        assert set(tests.values()) == {"skipped"}


@pytest.mark.processes
def test_nothing_needs_packages_that_a_machine_with_a_gpu_may_lack():
    modules = [part.module for part in PARTS]
    program = f"import sys; sys.modules.update(dict.fromkeys({MISSING})); import {', '.join(modules)}"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_rounding_is_that_of_tf32():
    X = torch.tensor([1.0, 1 + 2.0**-10, 1 + 2.0**-12, 1 + 3 * 2.0**-12, -3.14159])
    expected = [1.0, 1 + 2.0**-10, 1.0, 1 + 2.0**-10, -3.140625]
    assert tf32.rounded(X).tolist() == expected


def test_increments_in_tf32_keep_orthonormality_in_relation_to_the_step():
    """The error of a step is about 1e-4 of it; with all products in TF32 it does not depend on the step."""
    small, large = (tf32.drift(tf32.WAYS[1], step, (1,), 96, 24)[0] for step in (1e-3, 1e-2))
    assert 5 < large / small < 20 and large < 5e-6
    assert tf32.drift(tf32.WAYS[0], 1e-3, (1,), 96, 24)[0] > 1e-5
    assert tf32.drift(tf32.WAYS[2], 1e-1, (5,), 96, 24)[0] < 1e-7
