"""`compress.py`, copied alone into an empty folder: two bounds side by side, and wrong calls."""

import pytest
from transformers import AutoModelForImageClassification

from hf_condlr import CompressionReport, condition_report
from tests.compression.cases import image_processor, pictures, vit
from tests.paths import ROOT
from tests.recipes.recipe_runs import copied, parse, words


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return copied("compress", tmp_path_factory.mktemp("copied"))


def test_two_bounds_side_by_side(recipe, tmp_path, capsys):
    vit().save_pretrained(tmp_path / "model")
    image_processor().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split, rows in pictures(rows=16).items():
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    options = {
        "model": tmp_path / "model",
        "dataset_name": tmp_path / "data",
        "ratio": 0.4,
        "taus": [4.0, 1.0],
        "attacks": ["fgsm"],
        "epsilons": ["1/255", "2/255"],
        "attack_samples": 8,
        "calibration_samples": 16,
        "output_dir": tmp_path / "out",
    }
    recipe.main(*parse(recipe, words(**options)))
    printed = capsys.readouterr().out
    for tau in (4.0, 1.0):
        folder = tmp_path / "out" / f"tau-{tau:g}"
        report = CompressionReport.load(folder)
        assert list(report.factored.robust) == ["fgsm, ε = 1/255", "fgsm, ε = 2/255"]
        assert str(folder) in printed and str(report) in printed and report.data["attacked"] == 8
        model = AutoModelForImageClassification.from_pretrained(folder)
        assert condition_report(model).max_condition_number <= (1 + tau) * (1 + 1e-4)


def test_the_file_of_options(recipe, capsys):
    source, args = parse(recipe, [str(ROOT / "recipes" / "configs" / "compress.yaml"), "--taus", "4", "1"])
    assert args.target_modules == "all-linear" and args.exclude_modules is None
    assert (source.taus, source.epsilons, args.ratio, args.max_length) == ([4.0, 1.0], ["0.02", "0.05"], 0.6, 64)
    named = words(model="m", dataset_name="d", output_dir="o", ratio=0.4, target_modules=["query", "value"])
    assert parse(recipe, named)[1].target_modules == ["query", "value"]
    with pytest.raises(SystemExit):
        parse(recipe, words(model="m", dataset_name="d", output_dir="o", ratio=0.4, attacks=["fgsm"]))
    assert "attacks and epsilons belong together" in capsys.readouterr().err
