"""The text recipes started by accelerate on one process and on two, all at once."""

import subprocess

import pytest
from datasets import Dataset

from tests.recipes.recipe_runs import launch, read, words
from tests.recipes.test_language_modeling import FRESH as LANGUAGE
from tests.recipes.test_text_classification import FRESH as CLASSES
from tests.recipes.test_text_classification import write_reviews
from tests.text_models import reviews


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{recipe: output folder and print of one process, and of two}."""
    folder = tmp_path_factory.mktemp("launched")
    labelled = write_reviews(folder / "labelled", train=64, validation=16, test=37)
    for seed, (split, size) in enumerate({"train": 60, "validation": 20, "test": 23}.items()):
        (folder / "plain").mkdir(exist_ok=True)
        Dataset.from_dict({"text": reviews(size, seed)[0]}).to_parquet(folder / "plain" / f"{split}.parquet")
    sizes = {"per_device_eval_batch_size": 4}
    recipes = {
        "text_classification": CLASSES | sizes | {"dataset_name": labelled, "epsilons": 0.1, "attack_steps": 1},
        "language_modeling": LANGUAGE | sizes | {"dataset_name": folder / "plain"},
    }
    started = {}
    for recipe, options in recipes.items():
        for config, batch_size in (("cpu.yaml", 16), ("ddp_cpu.yaml", 8)):
            out = folder / f"{recipe}-{config}"
            options = options | {"per_device_train_batch_size": batch_size, "output_dir": out}
            command, environment = launch(config, f"{recipe}.py", *words(**options))
            command[2:2] = ["--main_process_port", "0"]  # launches at once must not meet at one
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.setdefault(recipe, []).append((out, subprocess.Popen(command, env=environment, **pipes)))
    ended = {}
    for recipe, launched in started.items():
        for out, process in launched:
            printed, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            ended.setdefault(recipe, []).append((out, printed))
    return ended


@pytest.mark.parametrize(
    ("recipe", "said"), [("text_classification", "test_accuracy_pgd_embedding_0.1"), ("language_modeling", "sample: ")]
)
def test_two_processes_are_as_one(runs, recipe, said):
    (one, alone), (two, printed) = runs[recipe]
    assert alone.count(said) == printed.count(said) == 1  # the main process speaks for all
    assert [read(folder / "settings.json")["processes"] for folder in (one, two)] == [1, 2]
    one, two = read(one / "all_results.json"), read(two / "all_results.json")
    assert set(two) >= set(one)
    for split in ("eval", "test"):
        assert one[f"{split}_samples"] == two[f"{split}_samples"]
        # The same optimizer steps on the same batches in all, joined or shared, but for dropout.
        assert two[f"{split}_loss"] == pytest.approx(one[f"{split}_loss"], rel=2e-2)
    assert two["test_kappa_max"] <= 1.1 * (1 + 1e-4)
    if recipe == "language_modeling":
        assert two["start_loss"] == pytest.approx(one["start_loss"], rel=1e-5)  # of an uneven number of blocks
        assert two["test_tokens"] == one["test_tokens"] == 32 * one["test_samples"]
    else:
        assert (two["test_samples"], two["test_attacked_samples"]) == (37, 37)
        assert round(37 * two["test_accuracy_pgd_embedding_0.1"], 6) % 1 == pytest.approx(0, abs=1e-4)
