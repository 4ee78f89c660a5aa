"""Metrics of `evaluate`: values by hand, what is refused, and several processes against one."""

import json
import math
import subprocess
import sys

import evaluate
import numpy as np
import pytest
import torch

from hf_condlr import AttackSuccessRate, RobustAccuracy
from hf_condlr.errors import EvaluationError

# Classes of eight samples; by hand: five survive the attack, four of these were right before; six were right before.
LABELS = [0, 1, 2, 0, 1, 2, 0, 1]
CLEAN = [0, 1, 2, 0, 1, 2, 1, 2]
ATTACKED = [0, 1, 2, 0, 0, 1, 0, 0]
WITHOUT_CLEAN = {"predictions": ATTACKED, "references": LABELS}
ALL = {**WITHOUT_CLEAN, "clean_predictions": CLEAN}
CASES = {
    "robust_accuracy": ((RobustAccuracy, None), WITHOUT_CLEAN, 5 / 8),
    "robust_accuracy with clean": ((RobustAccuracy, "with_clean"), ALL, 4 / 8),
    "attack_success_rate": ((AttackSuccessRate, None), ALL, 2 / 6),
}
PROCESS = """
import json, sys
import hf_condlr

folder, process_id, start, end, cases = json.loads(sys.argv[1])
for name, config_name, inputs in cases:
    metric = getattr(hf_condlr, name)(
        config_name, cache_dir=folder, num_process=2, process_id=process_id, experiment_id="two"
    )
    metric.add_batch(**{key: values[start:end] for key, values in inputs.items()})
    print(json.dumps(metric.compute()))
"""


@pytest.fixture
def make(tmp_path):
    return lambda cls, config_name=None, **options: cls(config_name, cache_dir=str(tmp_path), **options)


@pytest.mark.parametrize("case", CASES)
def test_value(case, make):
    arguments, inputs, expected = CASES[case]
    metric, name = make(*arguments), case.split()[0]
    assert metric.name == name
    assert metric.compute(**inputs) == {name: pytest.approx(expected)}
    for i in range(0, 8, 3):  # batches of unequal sizes
        metric.add_batch(**{key: np.array(values[i : i + 3]) for key, values in inputs.items()})
    assert metric.compute() == {name: pytest.approx(expected)}
    for i in range(8):
        a, y, *c = (int(values[i]) for values in inputs.values())
        metric.add(prediction=a, reference=y, **{"clean_predictions": c[0]} if c else {})
    assert metric.compute() == {name: pytest.approx(expected)}
    assert metric.compute(**{key: torch.tensor(values) for key, values in inputs.items()})[name] == expected


@pytest.mark.processes
def test_two_processes_agree_with_one(tmp_path):
    """Real processes, with shares of different sizes; only process 0 has the results."""
    cases = [(cls.__name__, config_name, inputs) for (cls, config_name), inputs, _ in CASES.values()]
    processes = []
    for i, share in enumerate([(0, 5), (5, 8)]):
        command = [sys.executable, "-c", PROCESS, json.dumps([str(tmp_path), i, *share, cases])]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    ended = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [error for _, error in ended]
    results = [[json.loads(line) for line in output.splitlines()] for output, _ in ended]
    assert results[0] == [{name.split()[0]: pytest.approx(value)} for name, (_, _, value) in CASES.items()]
    assert results[1] == [None] * 3


def test_both_combine_however_the_samples_come(make):
    combined = evaluate.combine([make(RobustAccuracy, "with_clean"), make(AttackSuccessRate)])
    expected = {"robust_accuracy": 4 / 8, "attack_success_rate": pytest.approx(2 / 6)}
    assert combined.compute(**ALL) == expected
    combined.add_batch(**ALL)
    assert combined.compute() == expected


def test_nothing_to_succeed_at_is_no_success(make):
    rate = make(AttackSuccessRate).compute(predictions=[1, 0], references=[0, 1], clean_predictions=[1, 0])
    assert math.isnan(rate["attack_success_rate"])


def test_metrics_describe_themselves_as_evaluates_own_do(make):
    metric = make(AttackSuccessRate)
    assert list(metric.features) == ["predictions", "references", "clean_predictions"]
    assert "under attack" in metric.inputs_description and metric.citation and metric.description
    assert list(make(RobustAccuracy).features) == ["predictions", "references"]


@pytest.mark.parametrize("case", CASES)
def test_no_samples_have_no_share(case, make):
    arguments, inputs, _ = CASES[case]
    with pytest.raises(EvaluationError, match="a share needs at least one sample; received none"):
        make(*arguments).compute(**{key: [] for key in inputs})
    with pytest.raises(ValueError, match="call `add` or `add_batch` at least once"):
        make(*arguments).compute()


@pytest.mark.parametrize("case", CASES)
def test_unequal_lengths_are_refused(case, make):
    arguments, inputs, _ = CASES[case]
    last = list(inputs)[-1]
    with pytest.raises(ValueError, match=rf"Mismatch in the number of predictions \(8\) and {last} \(7\)"):
        make(*arguments).compute(**inputs | {last: inputs[last][:7]})


def test_logits_are_refused(make):
    with pytest.raises(ValueError, match="don't match the expected format"):
        make(RobustAccuracy).compute(predictions=[[0.1, 0.9]], references=[1])


def test_clean_predictions_are_neither_ignored_nor_assumed(make):
    with pytest.raises(
        EvaluationError, match=r"received clean_predictions as well. Use RobustAccuracy\('with_clean'\)"
    ):
        make(RobustAccuracy).compute(**ALL)
    with pytest.raises(ValueError, match=r"inputs are missing: \['clean_predictions'\]"):
        make(RobustAccuracy, "with_clean").compute(**WITHOUT_CLEAN)


def test_an_unknown_configuration_is_refused(make):
    with pytest.raises(EvaluationError, match="config_name must be None or 'with_clean'; received 'x'"):
        make(RobustAccuracy, "x")
