"""What the tests of the recipes share: their modules, command lines, and a training of a second."""

import importlib
import json
import os
import sys
from pathlib import Path

from tests.paths import ROOT

RECIPES = ROOT / "recipes"
METHODS = ("dense", "lowrank", "condlr")
VIT = (
    "{image_size: 8, patch_size: 4, num_channels: 1, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, "
    "intermediate_size: 64}"
)
ANY = {
    "rank_ratio": 0.25,
    "max_train_samples": 64,
    "max_eval_samples": 37,  # batches that two processes cannot share evenly
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "learning_rate": 3e-3,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}
SMALL = ANY | {"model_type": "vit", "config_overrides": [VIT], "attack_checks": False}  # the overrides are one word


def load(name):
    """A recipe's module; it finds those beside it as where it is run."""
    sys.path.insert(0, str(RECIPES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(RECIPES))


def words(**options):
    """A command line; None leaves an option out, a list is several words."""
    given = {name: value for name, value in options.items() if value is not None}
    return [
        text
        for name, value in given.items()
        for text in (f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)]))
    ]


def read(path):
    return json.loads(path.read_text())


def train(output_dir, name="image_classification", small=SMALL, **options):
    """Run a recipe in this process; returns the folder that it wrote."""
    recipe = load(name)
    recipe.main(*recipe.parse(words(**small | {"output_dir": output_dir} | options)))
    return output_dir


def launch(config, recipe, *arguments):
    """The command that accelerate starts the recipe with, and its environment."""
    command = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    command += ["--config_file", str(RECIPES / "accelerate" / config), str(RECIPES / recipe), *arguments]
    return command, os.environ | {"OMP_NUM_THREADS": "1"}
