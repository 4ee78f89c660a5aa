"""Interrupted evaluations, and evaluations in several processes."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from hf_condlr.robustness.attacks import PGD, Transfer
from hf_condlr.robustness.evaluation import RobustnessReport
from tests import classifiers
from tests.paths import ROOT
from tests.robustness.evaluation.evaluation import ATTACKS, comparable, evaluate


class Breaks(nn.Module):
    """A model that raises at a call."""

    def __init__(self, at):
        super().__init__()
        self.inner, self.calls, self.at = classifiers.pixel_mlp(), 0, at

    def forward(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.inner(x)


def test_a_resumed_evaluation_equals_an_uninterrupted_one(tmp_path):
    model = Breaks(at=None)
    uninterrupted, calls = evaluate(model, output_dir=tmp_path / "whole"), model.calls
    model = Breaks(at=calls // 3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, output_dir=tmp_path / "broken")
    done = list((tmp_path / "broken").glob("outcomes-*/*.json"))
    assert 0 < len(done) < 5 and not (tmp_path / "broken" / "report.json").exists()
    model = Breaks(at=None)
    resumed = evaluate(model, output_dir=tmp_path / "broken")
    assert comparable(resumed) == comparable(uninterrupted)
    assert 0 < model.calls < calls  # finished batches are not attacked again
    again = Breaks(at=None)
    assert comparable(evaluate(again, output_dir=tmp_path / "broken")) == comparable(uninterrupted)
    assert again.calls == 2  # of the first and the last batch, which tell whether it is the same evaluation
    assert comparable(RobustnessReport.load(tmp_path / "broken" / "report.json")) == comparable(uninterrupted)


def test_another_model_attack_choice_or_data_set_is_another_evaluation(tmp_path):
    evaluate(output_dir=tmp_path)
    changed = classifiers.pixel_mlp()
    changed.model.layers[4].bias.data += 1e-3
    pixels, labels = classifiers.held_out()
    darker = torch.utils.data.TensorDataset(0.9 * pixels, labels)
    transfer = [Transfer(PGD(0.1, steps=2), changed)], [Transfer(PGD(0.1, steps=2), classifiers.pixel_mlp())]
    for options in (
        {"model": changed},
        {"model": classifiers.pixel_mlp(scale=300.0)},  # the same parameters
        {"attacks": ATTACKS[:2]},
        {"attacks": transfer[0]},
        {"attacks": transfer[1]},
        {"dataset": darker},
        {"max_samples": 50},
        {"batch_size": 50},
    ):
        before = set(tmp_path.glob("outcomes-*"))
        evaluate(**options, output_dir=tmp_path)
        assert len(set(tmp_path.glob("outcomes-*")) - before) == 1


def test_batches_whose_data_changed_are_attacked_again(tmp_path):
    """In the middle, where the key does not look."""
    pixels, labels = classifiers.held_out()
    changed = pixels.clone()
    changed[60:120] = changed[60:120].flip(-1)
    first, second = (torch.utils.data.TensorDataset(x, labels) for x in (pixels, changed))
    evaluate(dataset=first, output_dir=tmp_path)
    assert comparable(evaluate(dataset=second, output_dir=tmp_path)) == comparable(evaluate(dataset=second))
    assert len(list(tmp_path.glob("outcomes-*"))) == 1


SCRIPT = """
import sys

import torch
from accelerate import Accelerator
from hf_condlr import evaluate_robustness
from tests import classifiers
from tests.robustness.evaluation.evaluation import ATTACKS

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
report = evaluate_robustness(
    classifiers.mlp(), classifiers.images(), ATTACKS, processor=classifiers.processor(), batch_size=48,
    accelerator=accelerator, output_dir=sys.argv[1], check_samples=48, progress=False,
)
assert report.samples == 200
assert len(report.checks) > 10, report.checks
accelerator.end_training()
"""


@pytest.mark.processes
def test_two_processes_give_what_one_gives(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    process = subprocess.run(
        [sys.executable, *command, tmp_path / "script.py", tmp_path / "two"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    two = RobustnessReport.load(tmp_path / "two" / "report.json")
    one = evaluate(
        classifiers.mlp(), classifiers.images(), processor=classifiers.processor(), check_samples=48, checks=True
    )
    assert two.settings["processes"] == 2 and comparable(two) == comparable(one)
