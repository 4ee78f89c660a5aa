"""`write_model_card`: what it states against the report, and what it leaves alone."""

import re
import sys

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from hf_condlr import CondLRConfig, attach_manifold_step, condition_report, get_robust_lowrank_model
from hf_condlr.errors import CondLRError
from hf_condlr.model_card import write_model_card
from tests.models import bert, vit

BASE = "someone/tiny-vit"
PGD = {"attack": "pgd-linf", "epsilon": 8 / 255, "steps": 20, "restarts": 1, "accuracy": 0.71, "samples": 500}
FGSM = {"attack": "fgsm", "epsilon": 0.01, "accuracy": np.float64(0.8125), "step_size": None}
MEASURED = {"robustness": [PGD, FGSM], "metrics": {"accuracy": torch.tensor(0.875), "f1": 0.5}, "dataset": "cifar10"}


def factored(build=vit, *, name="", **options):
    model = get_robust_lowrank_model(build(), CondLRConfig(**({"r": 3} | options)))
    model.config._name_or_path = name
    return model


def write(folder, model=None, **options):
    return write_model_card(model or factored(), folder, **{"plot": False, **options})


def header(path):
    return yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])


def table(text, heading):
    """Rows of the table whose first heading is `heading`, as lists of cells."""
    rows = re.search(rf"^\| {heading} .*\n\| ---.*\n((\|.*\n?)+)", text, re.MULTILINE).group(1)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.strip().splitlines()]


# ------------------------------------------------------------------------------------------------------------- contents


def test_header_states_what_the_model_is(tmp_path):
    data = ModelCard.load(write(tmp_path / "tiny", factored(name=BASE), **MEASURED)).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == (BASE, "transformers", "image-classification")
    assert data.datasets == ["cifar10"]
    assert {"condlr", "low-rank", "robustness", "compression"} <= set(data.tags)
    assert data.license is None
    assert data.model_name == "tiny"


def test_results_in_the_header_hold_values_and_attack_parameters(tmp_path):
    results = ModelCard.load(write(tmp_path, **MEASURED)).data.eval_results
    assert {(r.task_type, r.dataset_type, r.dataset_name) for r in results} == {
        ("image-classification", "cifar10", "cifar10")
    }
    assert [(r.metric_type, r.metric_value, r.metric_config) for r in results] == [
        ("accuracy", 0.875, None),
        ("f1", 0.5, None),
        ("robust_accuracy", 0.71, "pgd-linf"),
        ("robust_accuracy", 0.8125, "fgsm"),
    ]
    assert results[2].metric_args == {"epsilon": 8 / 255, "steps": 20, "restarts": 1, "samples": 500}
    assert results[3].metric_args == {"epsilon": 0.01}
    assert "pgd-linf (epsilon 0.03137, steps 20, restarts 1, samples 500)" in results[2].metric_name


def test_tables_hold_the_measurements(tmp_path):
    text = ModelCard.load(write(tmp_path, **MEASURED)).text
    assert "On cifar10." in text
    assert table(text, "metric") == [["accuracy", "0.875"], ["f1", "0.5"]]
    assert table(text, "attack") == [
        ["pgd-linf", "0.03137", "20", "1", "500", "0.71"],
        ["fgsm", "0.01", "", "", "", "0.8125"],
    ]


def test_nothing_is_stated_that_was_not_measured(tmp_path):
    card = ModelCard.load(write(tmp_path))
    assert set(header(tmp_path / "README.md")) == {"library_name", "pipeline_tag", "tags"}
    assert "No attack on this model is reported here" in card.text
    assert not re.search(r"## (Measured|Licence)|robust accuracy|condition\.png|made from", card.text)


def test_a_data_set_without_a_hub_id_is_no_identifier(tmp_path):
    path = write(tmp_path, metrics={"accuracy": 0.5}, dataset="digits of scikit-learn")
    assert "datasets" not in header(path)
    result = ModelCard.load(path).data.eval_results[0]
    assert (result.dataset_type, result.dataset_name) == ("unknown", "digits of scikit-learn")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_and_layers_are_those_of_the_report(dtype, tmp_path):
    model, dense = factored().to(dtype), vit()
    report, text = condition_report(model), ModelCard.load(write(tmp_path, model)).text
    size = torch.finfo(dtype).bits // 8
    count, full = (sum(p.numel() for p in m.parameters()) for m in (model, dense))
    removed = f"{1 - count / full:.1%}"
    assert f"| parameters | {count:,} | {full:,} | {removed} |" in text
    assert f"| bytes | {count * size:,} | {full * size:,} | {removed} |" in text
    for row, layer in zip(table(text, "layer"), report.layers, strict=True):
        shape = f"{layer.shape[0]} × {layer.shape[1]}"
        share = f"{layer.parameters / layer.dense_parameters:.1%}"
        kappa = f"{layer.condition_number:.4g}"
        assert row == [f"`{layer.name}`", shape, "3", kappa, "none", f"{layer.parameters:,}", share]
    assert f"κ {report.max_condition_number:.4g}, mean {report.mean_condition_number:.4g}" in text
    assert f"{report.max_orthonormality_error:.1e}" in text


def stepped(**options):
    model = factored(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach_manifold_step(optimizer, model)
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    return model


@pytest.mark.parametrize(
    ("model", "stated"),
    [
        (lambda: factored(tau=0.01), "τ = 0.01, and κ ≤ 1 + τ = 1.01 holds for 0 of the 12 factored layers."),
        (lambda: stepped(tau=0.25), "τ = 0.25, and κ ≤ 1 + τ = 1.25 holds for 12 of the 12 factored layers."),
        (lambda: factored(tau="inf"), "τ = ∞: the cores are not constrained."),
        (
            lambda: stepped(tau_pattern={"fc1": "inf", "fc2": 0.5}),
            "τ = 0.1 or 0.5 or ∞, and κ ≤ 1 + τ holds for 10 of the 10 factored layers whose τ is finite.",
        ),
    ],
    ids=["not trained", "trained", "no bound", "several"],
)
def test_tau_is_stated_with_where_it_holds(model, stated, tmp_path):
    assert f"Here {stated}" in ModelCard.load(write(tmp_path, model())).text


def test_bound_in_force_is_in_the_table(tmp_path):
    rows = table(ModelCard.load(write(tmp_path, stepped(tau=0.25))).text, "layer")
    assert {row[4] for row in rows} == {"1.25"}


@pytest.mark.parametrize(("build", "collapsed"), [(vit, False), (bert, True)])
def test_more_than_twelve_layers_are_collapsed(build, collapsed, tmp_path):
    assert ("<details>" in ModelCard.load(write(tmp_path, factored(build))).text) is collapsed


def test_picture_where_matplotlib_is_installed(tmp_path):
    path = write(tmp_path, plot=True)
    assert (tmp_path / "condition.png").read_bytes().startswith(b"\x89PNG")
    assert "](condition.png)" in path.read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "condition.png"]


def test_no_picture_without_matplotlib(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "condition.png" not in write(tmp_path, plot=True).read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


# --------------------------------------------------------------------------------------------------------------- errors


def test_a_dense_model_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(CondLRError, match="must have factored layers; received none"):
        write(tmp_path / "out", vit())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": {"loss": float("nan")}}, "a metric must be a finite number.*loss=nan"),
        ({"metrics": {"report": {"a": 1}}}, "a metric must be a finite number"),
        ({"robustness": [{"attack": "pgd", "accuracy": 71}]}, r"accuracy in \[0, 1\]; received .*accuracy=71"),
        ({"robustness": [{"attack": "pgd"}]}, "accuracy=None"),
        ({"robustness": [{"accuracy": 0.5}]}, "attack=None"),
    ],
)
def test_what_is_no_measurement_is_refused(options, message, tmp_path):
    with pytest.raises(CondLRError, match=message):
        write(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
