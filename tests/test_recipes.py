"""The recipes as a user runs them: launched by accelerate on one process, by torchrun on two, and wrongly called."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = {"max_train_samples": 64, "max_eval_samples": 37}  # 37: batches that two processes cannot share evenly


def load(name):
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def recipe():
    return load("image_classification")


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture(scope="module")
def folder(demo, tmp_path_factory):
    """What `demo.py` wrote: it launches the recipe for the pretraining and for each method."""
    folder = tmp_path_factory.mktemp("demo")
    demo.main(
        demo.Arguments(pretraining_epochs=1, epochs=1, learning_rates=[3e-3, 1e-2], output_dir=str(folder), **TINY)
    )
    return folder


def result_in(folder):
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("method", ["dense", "lowrank", "condlr"])
def test_the_result_is_complete(folder, method):
    result = result_in(folder / "seed0" / method)
    assert result["arguments"]["method"] == method
    assert [run["learning_rate"] for run in result["sweep"]] == [3e-3, 1e-2]
    assert result["learning_rate"] in (3e-3, 1e-2)
    assert [run["validation"]["samples"] for run in result["sweep"]] == [37, 37]
    assert [attack["epsilon"] for attack in result["robust"]] == [0.025, 0.05, 0.075, 0.1, 0.15]
    for measured in (result["clean"], *result["robust"]):
        assert measured["samples"] == 37
        assert 0 <= measured["accuracy"] <= 1
    assert len(result["condition_numbers"]) == 24  # 4 blocks of 6 linear layers
    assert (folder / "seed0" / method / "model.safetensors").is_file()
    assert (folder / "seed0" / method / "condition.png").is_file() == (method != "dense")


def test_the_best_validation_accuracy_chooses_and_loss_breaks_ties(folder):
    result = result_in(folder / "seed0" / "condlr")
    best = min(result["sweep"], key=lambda run: (-run["validation"]["accuracy"], run["validation"]["loss"]))
    assert result["learning_rate"] == best["learning_rate"]


def test_only_condlr_bounds_the_condition_numbers(folder):
    kappa = {m: result_in(folder / "seed0" / m)["condition_numbers"].values() for m in ("dense", "lowrank", "condlr")}
    assert max(kappa["condlr"]) <= 1.1 * (1 + 1e-4)
    assert max(kappa["lowrank"]) > 1.2
    assert max(kappa["dense"]) > 1.2


def test_both_low_rank_methods_have_the_same_size(folder):
    lowrank, condlr = (result_in(folder / "seed0" / method) for method in ("lowrank", "condlr"))
    assert lowrank["parameters"] == condlr["parameters"] < 0.5 * condlr["dense_parameters"]
    assert lowrank["dense_parameters"] == condlr["dense_parameters"]


def test_the_demo_writes_table_and_picture(folder):
    rows = (folder / "table.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["method", "---", "dense", "lowrank", "condlr"]
    assert len({len(row) for row in rows}) == 1
    assert (folder / "demo.png").stat().st_size > 10_000


def test_seeds_give_mean_and_standard_deviation(demo):
    assert demo.spread([1.0, 3.0], ".1f") == "2.0 ± 1.4"
    assert demo.spread([2.0, 2.0], ".1f") == "2.0"


def test_the_saved_model_is_the_evaluated_one(folder, recipe):
    from accelerate import Accelerator

    saved = folder / "seed0" / "condlr"
    args = recipe.Arguments(method="dense", pretrained=str(saved), **TINY)
    data = recipe.load_data(args)
    pixels = data["train"].tensors[0]
    model = recipe.PixelModel(recipe.build_model(args), pixels.mean().item(), pixels.std().item())
    clean = recipe.evaluate(model, data["test"], Accelerator(cpu=True))
    assert clean["loss"] == pytest.approx(result_in(saved)["clean"]["loss"], rel=1e-3)


def test_two_processes_evaluate_the_true_number_of_samples(folder, tmp_path):
    # accelerate launch --cpu --num_processes 2 runs one process; torchrun runs two.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(RECIPES / "image_classification.py"), "--method", "condlr", "--epochs", "1"]
    command += ["--pretrained", str(folder / "seed0" / "pretrained"), "--learning_rates", "3e-3", "1e-2"]
    command += ["--epsilons", "0.05", "--output_dir", str(tmp_path)]
    command += [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test samples") == 1  # the main process speaks for all

    two, one = result_in(tmp_path), result_in(folder / "seed0" / "condlr")
    assert (two["processes"], one["processes"]) == (2, 1)
    assert [run["validation"]["samples"] for run in two["sweep"]] == [37, 37]
    assert two["clean"]["samples"] == two["robust"][0]["samples"] == 37
    assert set(two) == set(one)
    assert max(two["condition_numbers"].values()) <= 1.1 * (1 + 1e-4)
    for ours, theirs in zip(two["sweep"], one["sweep"], strict=True):  # the same batches, joined or shared
        assert ours["validation"]["loss"] == pytest.approx(theirs["validation"]["loss"], rel=1e-2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "robust"}, "method must be one of dense, lowrank, condlr; received 'robust'"),
        ({"tau": -0.1}, "tau.*received -0.1"),
        ({"rank_ratio": 1.5}, "rank_ratio.*received 1.5"),
        ({"learning_rates": []}, r"at least one number, all > 0; received \[\]"),
        ({"learning_rates": [1e-3, 0.0]}, r"all > 0; received \[0.0, 0.001\]"),
        ({"pretrained": "no/such/folder"}, "pretrained must be .* received 'no/such/folder'. Make one with"),
        ({"conditioning_warmup_ratio": 2.0}, "conditioning_warmup_ratio must be in .*received 2.0"),
        ({"epochs": 0}, "epochs must be ≥ 1; received 0"),
        ({"epsilons": [-0.1]}, "epsilon must be .*received -0.1"),
        ({"pgd_steps": 0}, "steps.*≥ 1.*received steps=0"),
    ],
)
def test_a_wrong_argument_is_an_error_with_rule_and_value(recipe, wrong, message):
    with pytest.raises(ValueError, match=message):
        recipe.Arguments(**wrong)


def test_the_command_line_says_a_mistake_in_one_line(recipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["image_classification.py", "--method", "robust"])
    with pytest.raises(SystemExit):
        recipe.parse()
    assert capsys.readouterr().err.splitlines()[-1].endswith("received 'robust'. Choose one of them.")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("run.yaml", "method: lowrank\nlearning_rates: [1e-3, 1e-2]\n"),  # YAML takes 1e-3 for text
        ("run.json", '{"method": "lowrank", "learning_rates": [0.001, 0.01]}'),
    ],
)
def test_a_file_may_be_the_only_argument(recipe, monkeypatch, tmp_path, file, text):
    (tmp_path / file).write_text(text)
    monkeypatch.setattr(sys, "argv", ["image_classification.py", str(tmp_path / file)])
    args = recipe.parse()
    assert (args.method, args.learning_rates, args.output_dir) == ("lowrank", [1e-3, 1e-2], "outputs/lowrank")
