"""`recipes/adversarial_evaluation.py` as a user runs it: two models, one and two processes, and wrong calls."""

import json
import re
import subprocess

import pytest
from transformers import ViTImageProcessorPil

from hf_condlr import CondLRConfig, RobustnessReport, get_robust_lowrank_model
from tests import models
from tests.recipes.recipe_runs import launch, load

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def recipe():
    return load("adversarial_evaluation")


@pytest.fixture
def options(tmp_path):
    """Words of a command line that attacks a dense and a factored model."""
    for name, factored in (("dense", False), ("condlr", True)):
        model = models.vit()
        if factored:
            get_robust_lowrank_model(model, CondLRConfig(rank_ratio=0.5))
        model.save_pretrained(tmp_path / name)
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / name)
    data = models.write_pictures(tmp_path / "pictures", number=15)
    words = ["--models", str(tmp_path / "dense"), str(tmp_path / "condlr"), "--dataset_name", str(data)]
    return [
        *words,
        "--steps",
        "3",
        "--batch_size",
        "8",
        "--attacks",
        "pgd-linf",
        "fgsm",
        "--epsilons",
        "1/255",
        "4/255",
    ]


def comparable(folder):
    """Reports without times and the number of processes, which the outcomes must not depend on."""
    values = json.loads((folder / "comparison.json").read_text())
    for report in values["reports"]:
        del report["settings"]["processes"]
        for attack in report["attacks"]:
            del attack["seconds"]
    return values


def test_two_models_side_by_side_on_one_process_and_on_two(recipe, options, tmp_path, capsys):
    recipe.main(recipe.parse([*options, "--output_dir", str(tmp_path / "one")]))
    said = capsys.readouterr().out
    assert "dense: 15 samples" in said and "condlr: 15 samples" in said and "less dense" in said
    assert (tmp_path / "one" / "curves.png").stat().st_size > 1000
    report = RobustnessReport.load(tmp_path / "one" / "condlr" / "report.json")
    assert report.samples == 15 and [a.name for a in report.attacks] == ["pgd-linf"] * 2 + ["fgsm"] * 2
    assert report.attacks[0].settings["steps"] == 3 and len(report.checks) > 10

    both = [*options, "--output_dir", str(tmp_path / "two"), "--use_cpu", "true"]
    command, environment = launch("ddp_cpu.yaml", "adversarial_evaluation.py", *both)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("condlr: 15 samples") == 1  # the main process speaks for both
    settings = json.loads((tmp_path / "two" / "comparison.json").read_text())["reports"][0]["settings"]
    assert settings["processes"] == 2
    assert comparable(tmp_path / "two") == comparable(tmp_path / "one")


def test_a_file_comes_first_and_the_command_line_wins(recipe, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "models: [a, b]\ndataset_name: d\nepsilons: [8/255, 0.1]\nchecks: false\nsteps: 5\n"
    )
    args = recipe.parse([str(tmp_path / "run.yaml"), "--steps", "7"])
    assert (args.models, args.epsilons, args.checks, args.steps) == (["a", "b"], ["8/255", "0.1"], False, 7)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--attacks", "magic"], "attack must be one of .*received 'magic'"),
        (["--epsilons", "8:255"], "epsilon must be a number or a fraction; received '8:255'"),
        (["--attacks", "fgsm", "--steps", "3"], "one of fgsm must have each option; received steps"),
        (["gone.yaml"], "No such file"),
    ],
)
def test_a_wrong_argument_is_said_in_one_line(recipe, capsys, wrong, message):
    with pytest.raises(SystemExit):
        recipe.parse([*wrong, "--models", "m", "--dataset_name", "d"])
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert re.search(message, line)


def test_names_tell_models_apart(recipe):
    assert recipe.labels(["me/vit", "out/bert"]) == ["vit", "bert"]
    assert recipe.labels(["a/model", "b/model"]) == ["a-model", "b-model"]
    with pytest.raises(SystemExit, match="Every model must be named once; received m, m"):
        recipe.labels(["m", "m"])
