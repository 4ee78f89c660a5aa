"""What the tests of the recipes share: each recipe copied alone into an empty folder, and a tiny training."""

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import get_type_hints

from hf_condlr import ScriptParser
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
IMAGES = ANY | {"model_type": "vit", "config_overrides": [VIT], "attack_checks": False}  # the overrides are one word


def copied(name, folder):
    """A recipe's module, from a copy that lies in `folder` alone."""
    path = Path(shutil.copy(RECIPES / f"{name}.py", folder))
    spec = importlib.util.spec_from_file_location(f"copied_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


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


def launch(config, recipe, *arguments):
    """The command that accelerate starts a recipe with, and its environment."""
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--main_process_port", "0"]
    command += ["--config_file", str(RECIPES / "accelerate" / config), str(recipe), *arguments]
    return command, os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def parse(recipe, line):
    """The arguments of a recipe's `main`."""
    kinds = [kind for name, kind in get_type_hints(recipe.main).items() if name != "return"]
    return ScriptParser(kinds).parse(line)


def run(recipe, output_dir, **options):
    """A training in this process; returns the folder that it wrote."""
    recipe.main(*parse(recipe, words(output_dir=output_dir, **options)))
    return output_dir
