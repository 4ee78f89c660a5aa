"""The text recipes started by accelerate, on one process and on two, all at once."""

import subprocess

import pytest
from datasets import Dataset

from .recipe_runs import launch, read, words
from .test_recipe_language_modeling import FRESH as LANGUAGE
from .test_recipe_text_classification import FRESH as CLASSES
from .test_recipe_text_classification import write_reviews
from .text_models import reviews

HALF = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4}  # of a process of two
WHOLE = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{(recipe, processes): output folder and what was printed}."""
    folder = tmp_path_factory.mktemp("launched")
    labelled = write_reviews(folder / "labelled", train=64, validation=16, test=37)
    for seed, (split, size) in enumerate({"train": 60, "validation": 20, "test": 23}.items()):
        (folder / "plain").mkdir(exist_ok=True)
        Dataset.from_dict({"text": reviews(size, seed)[0]}).to_parquet(folder / "plain" / f"{split}.parquet")
    attacked = {"epsilons": 0.1, "attack_steps": 1}
    recipes = {
        "text_classification": CLASSES | attacked | {"dataset_name": labelled},
        "language_modeling": LANGUAGE | {"dataset_name": folder / "plain"},
    }
    started = {}
    for recipe, options in recipes.items():
        for processes, config, sizes in ((1, "cpu.yaml", WHOLE), (2, "ddp_cpu.yaml", HALF)):
            out = folder / f"{recipe}{processes}"
            command, environment = launch(config, f"{recipe}.py", *words(**options | sizes, output_dir=out))
            if processes == 2:  # two launches at once must not meet at the same port
                command[2:2] = ["--main_process_port", "0"]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started[recipe, processes] = out, subprocess.Popen(command, env=environment, **pipes)
    ended = {}
    for key, (out, process) in started.items():
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        ended[key] = out, printed
    return ended


@pytest.mark.parametrize(
    ("recipe", "said"), [("text_classification", "test_accuracy_pgd_embedding_0.1"), ("language_modeling", "sample: ")]
)
def test_two_processes_are_as_one(runs, recipe, said):
    (one, _), (two, printed) = runs[recipe, 1], runs[recipe, 2]
    assert printed.count(said) == 1  # the main process speaks for all
    assert read(two / "settings.json")["processes"] == 2
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
