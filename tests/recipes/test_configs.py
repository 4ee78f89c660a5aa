"""Every file in `recipes/configs` and `recipes/accelerate` is taken by what it is for, and the docs list it."""

import re

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from tests.recipes.recipe_runs import RECIPES, copied, parse

CONFIGS = sorted((RECIPES / "configs").glob("*.yaml"))
LAUNCHERS = sorted((RECIPES / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_takes_every_option_of_its_file(path, tmp_path):
    text = path.read_text()
    [name] = set(re.findall(r"recipes/(\w+)\.py", text))
    arguments = parse(copied(name, tmp_path), [str(path), "--output_dir", str(tmp_path / "out")])
    taken = {name: value for part in arguments for name, value in vars(part).items()}
    for option, value in yaml.safe_load(text).items():
        if isinstance(value, (bool, int, float)):
            assert taken[option] == value
    if taken.get("model_type"):
        config, changes = arguments[0].config(), yaml.safe_load(text)["config_overrides"]
        assert {option: getattr(config, option) for option in changes} == changes


def test_the_docs_list_all_files_and_no_others():
    page = (RECIPES.parent / "docs" / "recipes.md").read_text()
    listed = set(re.findall(r"`((?:configs|accelerate)/\w+\.yaml)`", page))
    assert listed == {f"{path.parent.name}/{path.name}" for path in [*CONFIGS, *LAUNCHERS]}
    named = set(re.findall(r"recipes/((?:configs|accelerate)/\w+\.yaml)", page))
    assert named <= listed


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_takes_its_files(path):
    assert path.read_text().startswith("# ")  # what it is for
    config, values = load_config_from_file(str(path)), yaml.safe_load(path.read_text())
    assert {name: getattr(config, name) for name in values} == values
