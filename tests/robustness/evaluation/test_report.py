"""The report and the comparison: what is derived from outcomes, by hand; files; pictures."""

import json
import math
import sys

import numpy as np
import pytest
from PIL import Image

from hf_condlr import RobustnessReport, compare
from hf_condlr.errors import EvaluationError, MissingExtraError
from hf_condlr.robustness.evaluation import AttackResult, Check, plot_reports


def flags(text):
    return [character == "1" for character in text]


def report(model="ours", correct="1111111100", digest="a", **changed):
    outcomes = {
        ("pgd-linf", "linf", 0.1): "1111000000",
        ("square-linf", "linf", 0.1): "0111100000",
        ("pgd-linf", "linf", 0.3): "1100000000",
        ("characters", "characters", 0.2): "1011111100",
    } | changed.get("outcomes", {})
    attacks = [AttackResult(n, t, e, flags(s), {"attack": n, "steps": 20}) for (n, t, e), s in outcomes.items()]
    checks = [Check("a", True, "fine", "x"), Check("b", False, "3 of 9", "Doubt it."), Check("c", None, "no", "y")]
    return RobustnessReport(
        model, [0] * 10, flags(correct), attacks, checks, {"samples_digest": digest}, {"torch": "2"}
    )


def test_worst_cases_are_taken_sample_by_sample():
    r = report()
    assert r.samples == 10 and r.clean_accuracy == 0.8 and r.threats == ["linf", "characters"]
    assert [attack.robust_accuracy for attack in r.attacks] == [0.4, 0.4, 0.2, 0.7]
    worst = {(case.threat, case.epsilon): case.robust_accuracy for case in r.worst_cases}
    assert worst == {("linf", 0.1): 0.3, ("linf", 0.3): 0.2, ("characters", 0.2): 0.7}
    assert r.robust_accuracy == 0.0 + 0.0  # sample 0 falls to Square, 1 to the characters, the others to ε = 0.3
    assert report(outcomes={("characters", "characters", 0.2): "1111111100"}).robust_accuracy == 0.1
    assert r.attacks[0].standard_error == pytest.approx(math.sqrt(0.4 * 0.6 / 10))


def test_a_sample_that_is_wrong_without_an_attack_is_no_robust_one():
    corrected = report(outcomes={("jpeg", "corruption-jpeg", 1): "1111111111"})
    assert corrected.attacks[-1].robust_accuracy == 1.0
    assert corrected.worst_cases[-1].robust_accuracy == 0.8


def test_expected_robustness_is_the_area_under_the_curve():
    r = report()
    assert r.curve("linf") == ([0.0, 0.1, 0.3], [0.8, 0.3, 0.2])
    assert r.area("linf") == pytest.approx((0.1 * (0.8 + 0.3) / 2 + 0.2 * (0.3 + 0.2) / 2) / 0.3)
    assert r.area("characters") == pytest.approx(0.75)


def test_the_table_says_everything():
    lines = str(report()).splitlines()
    worst = "30.0% at linf ε = 25.5/255, 20.0% at linf ε = 76.5/255, 70.0% at characters ε = 0.2"
    assert lines[0] == f"ours: 10 samples, clean 80.0% ± 12.6%, {worst}"
    assert any(line.split() == ["worst", "case", "linf", "0.1", "30.0%", "±", "14.5%"] for line in lines)
    assert "robust accuracy, each sample's worst case over all attacks: 0.0%" in lines
    assert lines[-2] == "checks: 1 passed, 1 failed, 1 not applicable" and lines[-1] == "  FAILED: b: 3 of 9. Doubt it."


def test_a_file_holds_all_of_it(tmp_path):
    r = report()
    r.save(tmp_path / "deep" / "report.json")
    again = RobustnessReport.load(tmp_path / "deep" / "report.json")
    assert again == r and str(again) == str(r)
    values = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert values["areas"]["characters"] == pytest.approx(0.75) and values["correct"] == "1111111100"
    assert values["attacks"][0]["settings"]["steps"] == 20 and values["versions"] == {"torch": "2"}


def test_entries_for_a_model_card():
    assert report().card_entries()[0] == {
        "attack": "pgd-linf",
        "epsilon": 0.1,
        "steps": 20,
        "samples": 10,
        "accuracy": 0.4,
    }


def test_a_comparison_is_paired():
    first, second = report(), report("theirs", outcomes={("pgd-linf", "linf", 0.1): "0000110000"})
    comparison = compare([first, second])
    mean, error = comparison.difference(second, ("linf", 0.1))
    d = np.array([0, 0, 0, 0, 1, 0, 0, 0, 0, 0]) - np.array([0, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    assert mean == pytest.approx(d.mean()) and error == pytest.approx(d.std() / math.sqrt(10))
    assert comparison.difference(second, None) == (0.0, 0.0)
    text = str(comparison)
    assert "-20.0 ± 19.0" in text and "less ours" in text and "theirs: 1 checks failed" in text
    values = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert len(values["differences"]) == 4 and len(values["reports"]) == 2


def test_only_reports_of_the_same_samples_are_compared():
    with pytest.raises(
        EvaluationError, match="of the same samples to be compared; received different ones for ours, b"
    ):
        compare([report(), report("b", digest="other")])
    with pytest.raises(EvaluationError, match="must have names of their own to be compared; received ours, ours"):
        compare([report(), report()])
    weaker = report("b")
    weaker.attacks[0].settings = {"attack": "fgsm"}
    with pytest.raises(EvaluationError, match=r"of the same attacks to be compared; received .* ours for b"):
        compare([report(), weaker])
    with pytest.raises(EvaluationError, match="there must be reports to compare"):
        compare([])


def test_curves_are_drawn_a_panel_for_each_threat(tmp_path):
    pytest.importorskip("matplotlib")
    second = report("theirs", outcomes={("pgd-linf", "linf", 0.1): "0000000000"})
    path = compare([report(), second]).plot(tmp_path / "curves.png")
    with Image.open(path) as picture:
        one = np.asarray(picture.convert("RGB")).astype(int)
    assert one.shape[1] < one.shape[0] * 1.6  # one panel: characters have a single budget
    blue, orange = (np.abs(one - color).sum(-1) < 40 for color in ((43, 108, 176), (209, 128, 47)))
    assert blue.sum() > 200 and orange.sum() > 200
    assert np.nonzero(blue)[0].min() < np.nonzero(orange)[0].max()
    plot_reports([report(outcomes={("characters", "characters", 0.4): "1000000000"})], tmp_path / "two.png")
    with Image.open(tmp_path / "two.png") as two:
        assert two.size[0] > 1.6 * one.shape[1]
    assert report().plot(tmp_path / "curves.svg").read_text().startswith("<?xml")


def test_a_picture_needs_attacks_and_matplotlib(tmp_path, monkeypatch):
    with pytest.raises(EvaluationError, match="a curve needs an attack"):
        RobustnessReport("m", [0], [True], []).plot(tmp_path / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"hf_condlr\[plot\]"):
        report().plot(tmp_path / "x.png")
