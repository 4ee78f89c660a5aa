"""`adversarial_evaluation.py`, copied alone into an empty folder: two models side by side, and wrong calls."""

import pytest
from transformers import ViTImageProcessorPil

from hf_condlr import CondLRConfig, RobustnessReport, get_robust_lowrank_model
from tests import models
from tests.recipes.recipe_runs import copied, parse, read, words

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return copied("adversarial_evaluation", tmp_path_factory.mktemp("copied"))


def test_two_models_side_by_side(recipe, tmp_path, capsys):
    for name, factored in (("dense", False), ("condlr", True)):
        model = models.vit()
        if factored:
            get_robust_lowrank_model(model, CondLRConfig(rank_ratio=0.5))
        model.save_pretrained(tmp_path / name)
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / name)
    options = {
        "models": [tmp_path / "dense", tmp_path / "condlr"],
        "dataset_name": models.write_pictures(tmp_path / "pictures", number=15),
        "attacks": ["pgd-linf", "fgsm"],
        "epsilons": ["1/255", "4/255"],
        "attack_steps": 3,
        "batch_size": 8,
        "output_dir": tmp_path / "out",
    }
    recipe.main(*parse(recipe, words(**options)))
    printed = capsys.readouterr().out
    assert "dense: 15 samples" in printed and "condlr: 15 samples" in printed and "less dense" in printed
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000
    report = RobustnessReport.load(tmp_path / "out" / "condlr" / "report.json")
    assert report.samples == 15 and [a.name for a in report.attacks] == ["pgd-linf"] * 2 + ["fgsm"] * 2
    assert report.attacks[0].settings["steps"] == 3 and len(report.checks) > 10
    assert len(read(tmp_path / "out" / "comparison.json")["reports"]) == 2


def test_a_file_of_options(recipe, tmp_path):
    (tmp_path / "run.yaml").write_text("models: [a, b]\ndataset_name: d\nattacks: [fgsm]\nepsilons: [8/255, 0.1]\n")
    ours, attacks = parse(recipe, [str(tmp_path / "run.yaml"), "--max_attack_samples", "7"])
    assert (ours.models, attacks.epsilons, attacks.max_attack_samples) == (["a", "b"], ["8/255", "0.1"], 7)


def test_names_tell_models_apart(recipe, capsys):
    def labels(*models):
        return recipe.EvaluationArguments(list(models), "d").labels()

    assert labels("me/vit", "out/bert") == ["vit", "bert"]
    assert labels("a/model", "b/model") == ["a-model", "b-model"]
    with pytest.raises(SystemExit):
        parse(recipe, words(models=["m", "m"], dataset_name="d"))
    assert "every model must be named once; received m, m" in capsys.readouterr().err
