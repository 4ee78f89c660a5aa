"""`recipes/demo.py` as a user runs it, on fewer images."""

import pytest
import torch

from tests.recipes.recipe_runs import METHODS, load, read

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def folder(demo, tmp_path_factory):
    """What `demo.py` wrote, which calls the recipe for the pretraining and for each method."""
    folder = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    tiny = {"max_train_samples": 64, "max_eval_samples": 37}
    demo.main(
        demo.Arguments(pretraining_epochs=1, epochs=1, learning_rates=[3e-3, 1e-2], output_dir=str(folder), **tiny)
    )
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_the_demos_result_is_complete(folder, method):
    result = read(folder / "seed0" / f"{method}.json")
    assert [run["learning_rate"] for run in result["sweep"]] == [3e-3, 1e-2]
    assert result["learning_rate"] in (3e-3, 1e-2)
    assert result["samples"] == 37
    assert list(result["robust"]) == ["0.025", "0.05", "0.075", "0.1", "0.15"]
    assert all(0 <= accuracy <= 1 for accuracy in (result["clean"], *result["robust"].values()))
    assert len(result["condition_numbers"]) == 24  # 4 blocks of 6 linear layers


def test_the_best_validation_accuracy_chooses_and_loss_breaks_ties(folder, demo):
    for method in METHODS:
        result = read(folder / "seed0" / f"{method}.json")
        best = min(result["sweep"], key=lambda run: (-run["accuracy"], run["loss"]))
        assert result["learning_rate"] == best["learning_rate"]
    equal = [{"accuracy": 0.5, "loss": None}, {"accuracy": 0.5, "loss": 2.0}, {"accuracy": 0.5, "loss": 1.0}]
    assert min(equal, key=demo.worse) == equal[2]
    assert max(equal, key=demo.worse) == equal[0]  # a loss that is not finite loses


def test_only_condlr_bounds_the_condition_numbers(folder):
    kappa = {m: read(folder / "seed0" / f"{m}.json")["condition_numbers"].values() for m in METHODS}
    assert max(kappa["condlr"]) <= 1.1 * (1 + 1e-4)
    assert max(kappa["lowrank"]) > 1.2
    assert max(kappa["dense"]) > 1.2


def test_both_low_rank_methods_have_the_same_size(folder):
    lowrank, condlr = (read(folder / "seed0" / f"{method}.json") for method in ("lowrank", "condlr"))
    assert lowrank["parameters"] == condlr["parameters"] < 0.5 * condlr["dense_parameters"]
    assert lowrank["dense_parameters"] == condlr["dense_parameters"]


def test_the_demo_writes_table_and_picture(folder):
    rows = (folder / "table.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["method", "---", *METHODS]
    assert len({len(row) for row in rows}) == 1
    assert (folder / "demo.png").stat().st_size > 10_000


def test_seeds_give_mean_and_standard_deviation(demo):
    assert demo.spread([1.0, 3.0], ".1f") == "2.0 ± 1.4"
    assert demo.spread([2.0, 2.0], ".1f") == "2.0"
