"""Stages, the rows of each purpose, sizes, latency and the report, one by one."""

import math
import time

import pytest
import torch
from torch import nn

from hf_condlr import CompressionReport
from hf_condlr.compression.data import split
from hf_condlr.compression.labels import match_token_labels
from hf_condlr.compression.measure import largest_condition_number, latencies, size
from hf_condlr.compression.report import ModelMeasures
from hf_condlr.compression.search import Point
from hf_condlr.compression.stages import Stages
from hf_condlr.errors import ConfigError
from hf_condlr.scripts.dataset_arguments import with_source_rows
from tests import models
from tests.compression.cases import NAMES, case, pictures, vit


def test_a_step_is_done_once_and_its_result_read(tmp_path):
    calls = []

    def step():
        calls.append(1)
        return {"value": 1.5}

    for _ in range(2):
        stages = Stages(tmp_path / "out", {"a": 1})
        found = stages.run("first", step)
        assert found["value"] == 1.5 and found["seconds"] >= 0
    assert len(calls) == 1
    with pytest.raises(ConfigError, match=r"with its own model, data and settings; received a 1 → 2\."):
        Stages(tmp_path / "out", {"a": 2})


def test_settings_may_change_until_something_is_done(tmp_path):
    Stages(tmp_path / "out", {"a": 1})
    Stages(tmp_path / "out", {"a": 2}).run("first", lambda: {})
    with pytest.raises(ConfigError, match="received a 2 → 1"):
        Stages(tmp_path / "out", {"a": 1})


def rows(*names, number=40):
    return with_source_rows(pictures(rows=number, splits=names))


@pytest.mark.parametrize(
    ("names", "choose", "evaluation", "selection"),
    [
        (("train", "validation", "test"), True, ("test", 40), ("validation", 40)),
        (("train", "validation", "test"), False, ("test", 40), ("", 0)),
        (("train", "test"), True, ("half of test", 20), ("the other half of test", 20)),
        (("train", "validation"), False, ("validation", 40), ("", 0)),
        (("train",), True, ("half of rows held out of train", 3), ("the other half of rows held out of train", 3)),
    ],
)
def test_no_row_has_two_purposes(names, choose, evaluation, selection):
    found = split(rows(*names), choose_ratio=choose, seed=0)
    assert (found.evaluation_name, len(found.evaluation)) == evaluation
    assert (found.selection_name, len(found.selection or ())) == selection
    parts = [found.train, found.evaluation, *([found.selection] if found.selection else [])]
    places = [place for part in parts for place in part["source_row"]]
    assert len(places) == len({*places})


def test_multiply_adds_are_those_of_the_matrix_products_attention_included():
    model, (hidden, mlp, layers, tokens) = vit(), (16, 24, 2, 5)
    sample = {name: value[:1] for name, value in models.pixels().items()}
    patches = 4 * hidden * 3 * 8 * 8
    layer = tokens * (4 * hidden**2 + 2 * hidden * mlp) + 2 * tokens**2 * hidden  # scores and values
    found = size(model, sample)
    assert found["multiply_adds"] == patches + layers * layer + hidden * len(NAMES)
    assert found["parameters"] == model.num_parameters() and found["bytes"] == 4 * model.num_parameters()


class Sleeps(nn.Module):
    def __init__(self, seconds):
        super().__init__()
        self.weight, self.seconds = nn.Parameter(torch.zeros(1)), seconds

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        time.sleep(self.seconds)


def test_latency_is_in_milliseconds():
    slow, fast = latencies([Sleeps(0.02).train(), Sleeps(0.005)], {"x": torch.zeros(1)})
    assert 20 <= slow < 60 and 5 <= fast < 20


def test_the_largest_condition_number_of_dense_layers():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(2, 2)})
    with torch.no_grad():
        model["a"].weight.copy_(torch.diag(torch.tensor([8.0, 1.0, 2.0])))
        model["b"].weight.copy_(torch.diag(torch.tensor([3.0, 1.0])))
    assert largest_condition_number(model, ["a", "b"]) == pytest.approx(8)
    with torch.no_grad():
        model["b"].weight[0, 0] = 0
    assert largest_condition_number(model, ["a", "b"]) == math.inf


def test_tags_without_names_are_numbers_of_the_model():
    _, data, _ = case("token")
    plain = data.map(lambda row: {"labels": [-100, *row["ner_tags"][1:]]}, remove_columns="ner_tags")
    plain = with_source_rows(plain.rename_column("tokens", "words"))
    config = type("Config", (), {"id2label": dict(enumerate(NAMES))})()
    matched = match_token_labels(config, plain)
    assert matched["test"]["labels"] == [[-100, *tags[1:]] for tags in data["test"]["ner_tags"]]


def report(**changes):
    form = ModelMeasures(parameters=2_000_000, bytes=8_000_000, multiply_adds=10_000, latency_ms=1.5, quality=0.91)
    form.largest_kappa, form.robust, form.clean_of_attacked = math.inf, {"pgd-linf, ε = 1/255": 0.5}, 0.9
    data = {"evaluation": "test", "evaluation_rows": 1821, "attacked": 128, "calibration_rows": 256, "sample": "27"}
    data |= {"device": "cpu", "threads": 1, "dataset": None, "selection": "validation", "selection_rows": 872}
    values = {
        "metric": "accuracy",
        "ratio": 0.6,
        "tau": 4.0,
        "form": "factored",
        "dense": form,
        "factored": ModelMeasures(1_000_000, 4_000_000, 5_000, 1.0, 0.9, {"pgd-linf, ε = 1/255": 0.4}, 0.8, 4.9),
        "folded": ModelMeasures(900_000, 3_600_000, 4_000, 0.9),
        "pivoted": ModelMeasures(800_000, 3_200_000, 3_000, 0.8),
        "ranks": {"a": 4, "b": 90},
        "seconds": {"dense": 3.2, "factored": 8.0},
        "data": data,
    }
    return CompressionReport(**values | changes)


def test_the_table_has_every_measure_once_and_the_notes_say_what_it_does_not():
    text = report().table()
    for line in (
        "| parameters | 2,000,000 | 1,000,000 | 900,000 | 800,000 |",
        "| latency of a sample, ms | 1.50 | 1.00 | 0.90 | 0.80 |",
        "| clean accuracy, % | 91.00 | 90.00 |  |  |",
        "| clean accuracy of the attacked | 90.0% | 80.0% |  |  |",
        "| accuracy under pgd-linf, ε = 1/255 | 50.0% | 40.0% |  |  |",
        "| largest κ | ∞ | 4.9 |  |  |",
    ):
        assert line in text
    assert "2 layers of ranks 4 to 90, κ ≤ 5" in text and "1,821 samples of test, 128 of which were attacked" in text
    assert "11 seconds: measuring dense 3, converting 8" in text


def test_a_report_of_a_language_model_and_of_an_unbounded_one(tmp_path):
    form = ModelMeasures(10, 40, 20, 1.0, 33.256)  # κ: None, infinite
    curve = [Point(0.3, 9, 33.5, 0.73, 7.0), Point(0.5, 5, None, None, 9.0)]
    found = report(metric="perplexity", tau=math.inf, dense=form, max_drop=1.0, curve=curve, ratio=0.3)
    assert "| perplexity | 33.26 |" in found.table() and "κ not bounded" in found.table()
    assert "| largest κ | ∞ | 4.9 |  |  |" in found.table()
    assert "1 percent of the perplexity" in found.table() and "0.3: +0.73, 0.5: —" in found.table()
    found.save(tmp_path)
    assert CompressionReport.load(tmp_path) == found
    assert (tmp_path / "quality.png").stat().st_size > 1000
