"""`write_model_card`: what it states against the report, and what it leaves alone."""

import copy
import os
import re
import sys

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from torch import nn
from transformers import ViTForImageClassification

from hf_condlr import (
    CondLRConfig,
    LowRankLinear,
    attach_manifold_step,
    condition_report,
    fold_model,
    get_robust_lowrank_model,
)
from hf_condlr.checkpoints.card import BEGIN, END, TAGS, folded_card, write_model_card
from hf_condlr.checkpoints.card_header import SOURCE
from hf_condlr.errors import CondLRError
from tests.models import bert, gpt2, t5, vit

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


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")


def table(text, heading):
    """Rows of the table whose first heading is `heading`, as lists of cells."""
    rows = re.search(rf"^\| {heading} .*\n\| ---.*\n((\|.*\n?)+)", text, re.MULTILINE).group(1)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows.strip().splitlines()]


def test_header_states_what_the_model_is_and_what_was_measured(tmp_path):
    path = write(tmp_path / "tiny", factored(name=BASE), **MEASURED)
    data = ModelCard.load(path).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == (BASE, "hf_condlr", "image-classification")
    assert (data.datasets, data.license, data.model_name) == (["cifar10"], None, "tiny")
    assert data.tags == ["condlr", "low-rank", "robustness", "compression"]
    place = ("image-classification", "cifar10", "cifar10")
    assert {(r.task_type, r.dataset_type, r.dataset_name) for r in data.eval_results} == {place}
    assert {(r.source_name, r.source_url) for r in data.eval_results} == {(SOURCE["name"], SOURCE["url"])}
    assert [(r.metric_type, r.metric_value, r.metric_config, r.metric_args) for r in data.eval_results] == [
        ("accuracy", 0.875, None, None),
        ("f1", 0.5, None, None),
        ("robust_accuracy", 0.71, "pgd-linf", {"epsilon": 8 / 255, "steps": 20, "restarts": 1, "samples": 500}),
        ("robust_accuracy", 0.8125, "fgsm", {"epsilon": 0.01}),
    ]
    text = path.read_text("utf-8")
    assert "On cifar10." in text
    assert table(text, "metric") == [["accuracy", "0.875"], ["f1", "0.5"]]
    assert table(text, "attack") == [
        ["pgd-linf", "0.03137", "20", "1", "500", "0.71"],
        ["fgsm", "0.01", "", "", "", "0.8125"],
    ]


def test_nothing_is_stated_that_was_not_measured(tmp_path):
    path = write(tmp_path)
    assert set(header(path)) == {"library_name", "pipeline_tag", "tags"}
    text = path.read_text("utf-8")
    assert "No attack on this model is reported here" in text
    assert not re.search(r"## (Measured|Licence)|robust accuracy|condition\.png|made from", text)
    assert "datasets" not in header(write(tmp_path, metrics={"f1": 0.5}, dataset="digits of scikit-learn"))


def test_sizes_and_layers_are_those_of_the_report(tmp_path):
    model, dense = factored(), vit()
    report, text = condition_report(model), ModelCard.load(write(tmp_path, model)).text
    count, full = (sum(p.numel() for p in m.parameters()) for m in (model, dense))
    assert f"| parameters | {count:,} | {full:,} | {1 - count / full:.1%} |" in text
    folded = sum(p.numel() for p in fold_model(copy.deepcopy(model)).parameters())
    assert f"| parameters, folded for inference | {folded:,} | {full:,} | {1 - folded / full:.1%} |" in text
    for row, layer in zip(table(text, "layer"), report.layers, strict=True):
        shape = f"{layer.shape[0]} × {layer.shape[1]}"
        share = f"{layer.parameters / layer.dense_parameters:.1%}"
        kappa = f"{layer.condition_number:.4g}"
        assert row == [f"`{layer.name}`", shape, "3", kappa, "∞", f"{layer.parameters:,}", share]
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
    ("build", "options", "stated"),
    [
        (factored, {"tau": 0.01}, "τ = 0.01, and κ ≤ 1 + τ = 1.01 holds for 0 of the 12 factored layers."),
        (stepped, {"tau": 0.25}, "τ = 0.25, and κ ≤ 1 + τ = 1.25 holds for 12 of the 12 factored layers."),
        (factored, {"tau": "inf"}, "τ = ∞: the cores are not constrained."),
        (
            stepped,
            {"tau_pattern": {"fc1": "inf", "fc2": 0.5}},
            "τ = 0.1 or 0.5 or ∞, and κ ≤ 1 + τ holds for 10 of the 10 factored layers whose τ is finite.",
        ),
    ],
)
def test_tau_is_stated_with_where_it_holds(build, options, stated, tmp_path):
    text = write(tmp_path, build(**options)).read_text("utf-8")
    assert f"Here {stated}" in text
    if stated.startswith("τ = 0.25"):
        assert {row[4] for row in table(text, "layer")} == {"1.25"}, "the bound in force"


@pytest.mark.parametrize(
    ("build", "name", "task"),
    [
        (vit, "ViTForImageClassification", "image-classification"),
        (bert, "BertForSequenceClassification", "text-classification"),
        (gpt2, "GPT2LMHeadModel", "text-generation"),
        (t5, "T5ForConditionalGeneration", "text-generation"),
    ],
)
def test_lines_that_load_the_model(build, name, task, tmp_path):
    path = write(tmp_path / "tiny", factored(build))
    lines = f'from transformers import {name}\n\nmodel = {name}.from_pretrained("your-name/tiny")'
    assert lines in path.read_text("utf-8")
    assert header(path)["pipeline_tag"] == task
    assert ("<details>" in path.read_text("utf-8")) is (build in (bert, t5)), "more than twelve layers"


def test_a_model_outside_transformers_has_a_card_too(tmp_path):
    path = write(tmp_path, nn.Sequential(LowRankLinear(7, 6, 2)))
    assert set(header(path)) == {"library_name", "tags"}
    assert "from_pretrained" not in path.read_text("utf-8")


@pytest.mark.parametrize("installed", [True, False])
def test_picture_where_matplotlib_is_installed(installed, tmp_path, monkeypatch):
    if not installed:
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = write(tmp_path, plot=True).read_text("utf-8")
    assert ("](condition.png)" in text) is installed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "condition.png"][: 1 + installed]


# ----------------------------------------------------------------------------------------------------------- base model


@pytest.mark.parametrize(
    ("name", "stated"), [(BASE, BASE), ("gpt2", "gpt2"), ("/gone/x", None), ("out/checkpoint-500", None)]
)
def test_base_model_is_the_name_loaded_from_where_that_is_a_hub_id(name, stated, tmp_path):
    assert header(write(tmp_path, factored(name=name))).get("base_model") == stated


def test_base_model_as_given_or_as_the_card_states(tmp_path):
    path = write(tmp_path, factored(name=BASE), base_model="other/base")
    for name in (BASE, str(tmp_path)):
        write(tmp_path, factored(name=name))
        assert header(path)["base_model"] == "other/base"
        assert "made from [other/base](https://huggingface.co/other/base)" in path.read_text("utf-8")
    with pytest.raises(CondLRError, match="must be a name on the Hub; received '/gone/x'"):
        write(tmp_path, base_model="/gone/x")


# ---------------------------------------------------------------------------------------------- a card that is there

USER_HEADER = """language: "no"
license: mit
base_model: mine/base
tags: [mine, robustness]
date: 2024-01-05
widget: [{text: Hello}]
model-index:
- name: mine
  results:
  - task: {type: image-classification}
    dataset: {type: cifar10, name: CIFAR}
    metrics: [{type: accuracy, value: 0.9}]
    source: {name: other, url: "https://example.org"}
  - task: {type: image-classification}
    dataset: {type: cifar10, name: cifar10}
    metrics: [{type: f1, value: 0.6}]
"""
USER_TEXT = "\n# My model\n\nWritten by hand, | and $dollars.\n"
USER_CARD = f"---\n{USER_HEADER}---\n{USER_TEXT}"


@pytest.mark.parametrize("content", [None, "", USER_TEXT, USER_CARD, USER_CARD.replace("\n", "\r\n"), "no line end"])
def test_twice_is_once(content, tmp_path):
    path = tmp_path / "README.md"
    if content is not None:
        path.write_bytes(content.encode())
    model = factored(name=BASE)
    once = write(tmp_path, model, **MEASURED).read_bytes()
    assert write(tmp_path, model, **MEASURED).read_bytes() == once
    assert once.endswith(b"\n") and b"\r" not in once


def test_the_users_text_and_header_survive(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(USER_CARD)
    write(tmp_path, factored(name=BASE), **MEASURED)
    edit(path, END, f"{END} and\n\n\nafter\n")
    write(tmp_path, factored(name=BASE, r=2), metrics={"accuracy": 0.8}, dataset="cifar10")
    before, after = yaml.safe_load(USER_HEADER), header(path)
    (users,), (merged,) = before.pop("model-index"), after.pop("model-index")
    assert merged["results"][:2] == users["results"]
    assert [(group["source"], group["metrics"][0]["value"]) for group in merged["results"][2:]] == [(SOURCE, 0.8)]
    assert after["tags"] == [*before.pop("tags"), "condlr", "low-rank", "compression"]
    assert before.items() <= after.items()
    text = ModelCard.load(path).text
    assert text.startswith(f"{USER_TEXT}\n{BEGIN}") and text.endswith(f"{END} and\n\n\nafter\n\n")
    assert "\n# " not in text.partition(BEGIN)[2], "the user has a title"
    assert "made from [mine/base]" in text


def test_results_survive_the_tools_of_the_hub(tmp_path):
    """huggingface_hub puts results of one task and data set into one group, under the first one's source."""
    path = write(tmp_path, **MEASURED)
    card = ModelCard.load(path)
    card.data.eval_results.append(EvalResult("image-classification", "cifar10", "cifar10", "wer", 9))
    card.save(path)
    write(tmp_path, metrics={"accuracy": 0.9}, dataset="cifar10")
    results = [(r.metric_type, r.metric_value, r.source_name) for r in ModelCard.load(path).data.eval_results]
    assert results == [("wer", 9, None), ("accuracy", 0.9, "hf_condlr")]
    write(tmp_path)
    assert [r.metric_type for r in ModelCard.load(path).data.eval_results] == ["wer"]


def test_the_card_of_transformers_is_completed(tmp_path):
    (tmp_path / "README.md").write_text("---\n# comment\nlibrary_name: other\ntags: []\nbase_model:\n---\n")
    stated = header(write(tmp_path, factored(name=BASE)))
    assert (stated["base_model"], stated["library_name"]) == (BASE, "other")
    (tmp_path / "README.md").write_text("---\nlibrary_name: transformers\ntags: [trainer]\n---\n")
    stated = header(write(tmp_path))
    assert stated["library_name"] == "hf_condlr"  # transformers alone cannot load the model
    assert stated["tags"] == ["trainer", *TAGS]


def test_the_card_of_a_folded_model_says_how_to_load_it():
    card = folded_card(fold_model(factored()), "me/tiny", tags=["digits"])
    assert card.data.to_dict() == {
        "library_name": "hf_condlr",
        "pipeline_tag": "image-classification",
        "tags": [*TAGS, "digits"],
    }
    assert "# tiny\n" in card.text and 'ViTForImageClassification.from_pretrained("me/tiny")' in card.text
    assert "import hf_condlr  #" in card.text


def test_a_class_of_a_script_is_imported_from_the_script(monkeypatch):
    class Tiny(ViTForImageClassification):
        __module__ = "__main__"

    model = fold_model(factored())
    model.__class__ = Tiny
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "path/to/train.py", raising=False)
    assert "from train import Tiny\n" in folded_card(model, "me/tiny").text


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": vit()}, "must have factored layers; received none"),
        ({"metrics": {"loss": float("nan")}}, "a metric must be a finite number.*loss=nan"),
        ({"metrics": {"report": {"a": 1}}}, "a metric must be a finite number"),
        ({"robustness": [{"attack": "pgd", "accuracy": 71}]}, r"accuracy in \[0, 1\]; received .*accuracy=71"),
        ({"robustness": [{"attack": "pgd"}]}, "accuracy=None"),
        ({"robustness": [{"accuracy": 0.5}]}, "attack=None"),
    ],
)
def test_what_is_no_measurement_is_refused_before_anything_is_written(options, message, tmp_path):
    with pytest.raises(CondLRError, match=message):
        write(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


HEADER = "header of .*README.md must be YAML.*Correct or remove"
SECTION = "section of hf_condlr in .*README.md must stand"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"---\ntags: [a\n---\ntext\n", HEADER),
        (b"---\n- a\n---\ntext\n", HEADER),
        (b"---\ntags: a\n\nnot closed\n", HEADER),
        (b"---\nmodel-index:\n- results: 3\n---\n", HEADER),
        (b"---\ntags: \xff\n---\n", HEADER),
        *((f"Words\n{marks}\n".encode(), SECTION) for marks in (BEGIN, END, END + BEGIN, 2 * (BEGIN + END))),
    ],
)
def test_a_broken_card_is_refused_and_left_as_it_was(content, message, tmp_path):
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(CondLRError, match=message):
        write(tmp_path, plot=True)
    assert (tmp_path / "README.md").read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failure_while_writing_leaves_the_old_card(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(USER_CARD)
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(tmp_path)
    assert [p.read_text() for p in tmp_path.iterdir()] == [USER_CARD]


def test_hostile_names_stay_in_their_cells(tmp_path):
    for _ in range(2):
        path = write(tmp_path, robustness=[{"attack": f"a|b\n{END}", "accuracy": 0.5}])
    assert "| a\\|b &lt;!-- condlr:end --> | 0.5 |" in path.read_text("utf-8")
