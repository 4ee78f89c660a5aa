"""Progress outside of a terminal: what runs, and how long it will take."""

import pytest

from hf_condlr.robustness.attacks import PGD
from hf_condlr.robustness.evaluation import progress as module
from hf_condlr.robustness.evaluation.progress import Progress
from tests.robustness.evaluation.evaluation import evaluate


def test_lines_say_what_runs_and_how_long_it_takes(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 20.0, 50.0, 90.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with Progress("attacks", 10, show=True) as progress:
        for amount in (1, 1, 3):
            progress.advance(amount)
    assert capsys.readouterr().err.splitlines() == [
        "attacks: started",
        "attacks: 10% after 10 s, about 90 s left",
        "attacks: 50% after 50 s, about 50 s left",  # 20 s is too soon after 10 s
        "attacks: finished after 90 s",
    ]


@pytest.mark.parametrize("shown", [True, False])
def test_attacks_and_checks_are_shown(shown, capsys):
    evaluate(attacks=[PGD(16 / 255, steps=2)], checks="quick", check_samples=16, max_samples=32, progress=shown)
    finished = [line.split(": ")[0] for line in capsys.readouterr().err.splitlines() if "finished" in line]
    assert finished == (["1 attack on 32 samples", "checks"] if shown else [])
