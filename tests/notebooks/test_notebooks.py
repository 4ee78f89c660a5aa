"""The notebooks: valid, short, and their cells run in order, on tiny models and data in place of those of the Hub.

Without Jupyter: the code cells of a notebook are executed one after another in one namespace, in an empty folder. The
cell that installs is left out; what a cell would display is evaluated all the same.
"""

import json
import re

import pytest
import torch

from hf_condlr import condition_report
from tests.compression.cases import case
from tests.paths import ROOT

NOTEBOOKS = {  # name: the task of its model, and parameters that make it quick
    "compress_text_classifier": ("text", {"ROWS": "16"}),
    "finetune_vit": ("image", {"STEPS": "4", "ROWS": "16"}),
    "attack_and_compare": ("image", {"SAMPLES": "8"}),
}


def cells(name):
    return json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def code(name):
    return ["".join(cell["source"]) for cell in cells(name) if cell["cell_type"] == "code"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Saves a tiny model of a task with its processor, and its data, where the notebook's parameters say."""

    def save(task):
        model, data, processor = case(task)
        model.save_pretrained(tmp_path / "model")
        processor.save_pretrained(tmp_path / "model")
        (tmp_path / "data").mkdir()
        for split, rows in data.items():
            rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
        monkeypatch.setenv("MODEL", "model")
        monkeypatch.setenv("DATA", "data")

    monkeypatch.chdir(tmp_path)
    return save


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_short_and_installs_first(name):
    assert len(cells(name)) <= 15
    assert code(name)[0].startswith("%pip install") and "os.environ" in code(name)[1]
    assert not any("%" in line[:1] for source in code(name)[1:] for line in source.splitlines())
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < 200_000
    outputs = [output for cell in cells(name) for output in cell.get("outputs", ())]
    assert not any(output["output_type"] == "error" for output in outputs)
    assert not re.search(r'"[^"\n]*/(home|root|tmp|work)/', json.dumps(outputs))  # no path of a machine


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_valid(name):
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)
    assert not list(nbformat.validator.iter_validate(notebook))


@pytest.mark.processes  # among the slowest
@pytest.mark.filterwarnings("ignore")  # of the size of the tiny data
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_cells_of_a_notebook_run_in_order(name, folders, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    task, parameters = NOTEBOOKS[name]
    folders(task)
    for parameter, value in parameters.items():
        monkeypatch.setenv(parameter, value)
    namespace = {"__name__": "__main__"}
    for number, source in enumerate(code(name)[1:]):
        exec(compile(source, f"{name}, cell {number}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "κ" in printed or "robust" in printed
    trained = namespace["again"] if name == "finetune_vit" else namespace["small"]
    bound = 1 + (namespace["TAU"] if name == "finetune_vit" else 4.0)
    assert condition_report(trained).max_condition_number <= bound * (1 + 1e-4)
    if name == "attack_and_compare":
        pixels, changed = namespace["pixels"], namespace["changed"]
        assert 0 < (changed - pixels).abs().max() <= 4 / 255 + 1e-6
        assert torch.equal(changed, changed.clamp(0, 1))
