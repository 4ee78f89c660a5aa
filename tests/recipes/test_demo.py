"""`demo.py`, copied alone into an empty folder, with a training of one epoch."""

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_condlr import is_factored
from tests.recipes.recipe_runs import METHODS, copied, read

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return copied("demo", tmp_path_factory.mktemp("copied"))


@pytest.fixture(scope="module")
def folder(demo, tmp_path_factory):
    """What the demo wrote."""
    folder, threads, write = tmp_path_factory.mktemp("demo"), torch.get_num_threads(), demo.write_digits

    def few(place):
        return demo.DatasetDict({name: rows.select(range(64)) for name, rows in write(place).items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "PRETRAINING_EPOCHS", 1)
        patch.setattr(demo, "write_digits", few)
        demo.main(demo.Arguments(epochs=1, learning_rates=[3e-3, 1e-2], output_dir=str(folder)))
    torch.set_num_threads(threads)
    return folder


def test_the_result_of_each_method_is_complete(folder, demo):
    for method in METHODS:
        result = read(folder / "seed0" / f"{method}.json")
        assert [run["learning_rate"] for run in result["sweep"]] == [3e-3, 1e-2]
        best = min(result["sweep"], key=lambda run: (-run["accuracy"], run["loss"]))
        assert result["learning_rate"] == best["learning_rate"]
        assert list(result["robust"]) == ["0.025", "0.05", "0.075", "0.1", "0.15"]
        assert all(0 <= accuracy <= 1 for accuracy in (result["clean"], *result["robust"].values()))
        assert (result["samples"], len(result["condition_numbers"])) == (64, 24)  # 4 blocks of 6 linear layers
    equal = [{"accuracy": 0.5, "loss": None}, {"accuracy": 0.5, "loss": 2.0}, {"accuracy": 0.5, "loss": 1.0}]
    assert min(equal, key=demo.worse) == equal[2]
    assert max(equal, key=demo.worse) == equal[0]  # a loss that is not finite loses


def test_only_condlr_bounds_the_condition_numbers_and_both_low_rank_methods_have_the_same_size(folder):
    dense, lowrank, condlr = (read(folder / "seed0" / f"{method}.json") for method in METHODS)
    assert max(condlr["condition_numbers"].values()) <= 1.1 * (1 + 1e-4)
    assert min(max(result["condition_numbers"].values()) for result in (dense, lowrank)) > 1.2
    assert lowrank["parameters"] == condlr["parameters"] < 0.5 * condlr["dense_parameters"]
    assert lowrank["dense_parameters"] == condlr["dense_parameters"] == dense["parameters"]


def test_the_demo_writes_table_picture_and_images(folder):
    rows = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["method", "---", *METHODS]
    assert len({len(row) for row in rows[:1] + rows[2:]}) == 1
    assert (folder / "demo.png").stat().st_size > 10_000
    assert sorted(path.name for path in (folder / "digits").iterdir()) == [
        "test.parquet",
        "train.parquet",
        "validation.parquet",
    ]


def test_the_models_are_saved_for_the_space(folder):
    for method in METHODS:
        model = AutoModelForImageClassification.from_pretrained(folder / "seed0" / method)
        assert is_factored(model) == (method != "dense")
        processor = AutoImageProcessor.from_pretrained(folder / "seed0" / method)
        assert 0 < processor.image_mean[0] < 1
        result = read(folder / "seed0" / f"{method}.json")
        assert model.num_parameters() == result["parameters"]


def test_seeds_give_mean_and_standard_deviation(demo):
    assert demo.spread([1.0, 3.0], ".1f") == "2.0 ± 1.4"
    assert demo.spread([2.0, 2.0], ".1f") == "2.0"
