"""Every file in `recipes/configs` and `recipes/accelerate`: read by what it is for; the offline one trains."""

import re

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from tests.recipes.recipe_runs import RECIPES, load, read, words

CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
LAUNCHERS = sorted((RECIPES / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_takes_every_option_of_its_file(path):
    text = path.read_text()
    [recipe] = {word for word in text.split() if re.fullmatch(r"recipes/\w+(tion|ing)\.py", word)}
    arguments = load(recipe.removeprefix("recipes/").removesuffix(".py")).parse([str(path)])
    parts = arguments if isinstance(arguments, tuple) else (arguments,)
    taken = {name: value for part in parts for name, value in vars(part).items()}
    for name, value in yaml.safe_load(text).items():
        if isinstance(value, (bool, int, float)):
            assert taken[name] == value
    if taken.get("model_type"):
        config, changes = parts[0].fresh_config(), yaml.safe_load(text)["config_overrides"]
        assert {name: getattr(config, name) for name in changes} == changes


def test_the_files_are_those_that_the_docs_list():
    page = (RECIPES.parent / "docs" / "recipes.md").read_text()
    assert all(f"{path.parent.name}/{path.name}" in page for path in [*CONFIGS, *LAUNCHERS])


def test_the_digits_train_offline(tmp_path):
    pytest.importorskip("sklearn")
    load("digits").write_digits(tmp_path / "digits")
    recipe = load("image_classification")
    few = {"num_train_epochs": 1, "max_train_samples": 64, "max_eval_samples": 32, "attack_checks": False}
    places = {"dataset_name": tmp_path / "digits", "output_dir": tmp_path / "out", "use_cpu": True}
    recipe.main(*recipe.parse([str(RECIPES / "configs" / "digits.yaml"), *words(**few, **places)]))
    metrics = read(tmp_path / "out" / "all_results.json")
    assert metrics["test_kappa_max"] <= 1.1 * (1 + 1e-4)
    assert metrics["test_samples"] == metrics["test_attacked_samples"] == 32
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").is_file()


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_takes_its_files(path):
    assert path.read_text().startswith("# ")  # what it is for
    config, values = load_config_from_file(str(path)), yaml.safe_load(path.read_text())
    assert {name: getattr(config, name) for name in values} == values
