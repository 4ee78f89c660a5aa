"""Two processes under DDP: equal factors on both, one process's training, and an error on both where they drift."""

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from hf_condlr import CondLRTrainingArguments, attach_manifold_step
from hf_condlr.distributed.replicas import checksums, is_due
from hf_condlr.errors import ConfigError, OptimizerError
from tests.distributed import distributed_processes
from tests.distributed.distributed_processes import BATCH, RESUMED_AT, STEPS
from tests.manifold.nets import make_model
from tests.paths import ROOT

pytestmark = pytest.mark.processes

TOLERANCE = 1e-10  # float64, six AdamW steps; measured beside each use


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights and results of one process, then of two, as `distributed_processes.py` writes them."""
    folder = tmp_path_factory.mktemp("distributed")
    one = distributed_processes.trainer(folder / "one", batch_size=BATCH)
    one.train()
    torch.save(one.model.state_dict(), folder / "one.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command.append(distributed_processes.__name__)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(folder)], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def found(folder):
    """What each of the two processes found."""
    return [json.loads((folder / f"found-{process}.json").read_text()) for process in (0, 1)]


def difference(folder, name, other="one"):
    first, second = (torch.load(folder / f"{n}.pt", weights_only=True) for n in (name, other))
    assert first.keys() == second.keys()
    return max((first[key] - second[key]).abs().max().item() for key in first)


def test_factors_are_equal_on_both_processes(found):
    """Bit for bit after 12 float32 AdamW steps on different data; also of models that were drawn differently."""
    for process in found:
        assert process["difference between processes"] == 0
        assert process["different seeds"] == 0


def test_zero_1_is_the_same_training(found):
    """Bit for bit, in float32."""
    assert all(process["ZeRO-1 equals not sharded"] is True for process in found)


def test_two_processes_that_accumulate_train_as_one(folder):
    """2 processes × 2 parts × 4 samples against 16 (measured: 9e-16)."""
    assert difference(folder, "two") < TOLERANCE


def test_resume_on_two_processes_what_one_began(folder, found):
    assert [process["steps"] for process in found] == [STEPS, STEPS]
    assert difference(folder, "resumed") < TOLERANCE  # measured: 3e-16


def test_resume_on_one_process_what_two_began(folder):
    one = distributed_processes.trainer(folder / "again", batch_size=BATCH)
    one.train(resume_from_checkpoint=str(folder / "two" / f"checkpoint-{RESUMED_AT}"))
    torch.save(one.model.state_dict(), folder / "again.pt")
    assert one.manifold_step.step_count == STEPS
    assert difference(folder, "again") < TOLERANCE  # measured: 1e-15


@pytest.mark.parametrize(("where", "step", "name"), [("drift", 4, "a.U"), ("drift in the Trainer", 4, ".V")])
def test_a_drift_is_an_error_on_both_processes(found, where, step, name):
    for process in found:
        assert re.match(
            rf"DriftError: every process must hold the same factors, bit for bit; received others than process 0's on "
            rf"process 1 after step {step}: .*{re.escape(name)}.*\. Go on from the last checkpoint",
            process[where],
        ), process[where]


def test_without_checks_processes_may_go_apart(found):
    assert [process["drift unseen"] for process in found] == ["nothing", "nothing"]
    assert all(process["models of their own"] > 0.1 for process in found)


def test_a_vanished_core_is_told_to_all(found):
    for process in found:
        assert "a core S must not vanish" in process["vanished"] and "b" in process["vanished"]


def test_one_bit_changes_a_checksum():
    for dtype, bits, r in (
        (torch.float32, torch.int32, 3),
        (torch.float32, torch.int32, 4),
        (torch.float64, torch.int64, 3),
    ):
        X = torch.randn(2, 7, r, dtype=dtype)
        for i, j, bit in itertools.product(range(7), range(r), (0, 5, 31)):
            other = X.clone()
            other.view(bits)[1, i, j] ^= torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(bits)
            assert (checksums([other]) != checksums([X])).tolist() == [False, True]


def test_a_checksum_is_that_of_the_values_wherever_they_lie():
    X = torch.randn(6, 4)
    inside = torch.cat([torch.zeros(1), X.flatten()])[1:].view(6, 4)  # at an odd place
    for other in (inside, X.mT.contiguous().mT):
        assert checksums([other[None]]) == checksums([X[None]])
    assert torch.equal(checksums([X[None], inside[None]]), checksums([torch.stack([X, X])]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_writes_to_many_entries_change_a_checksum(dtype):
    """Powers of two, signs, and permutations, with which sums of bits modulo a power of two could vanish."""
    X = torch.linalg.qr(torch.randn(64, 16, dtype=dtype)).Q[None]
    others = [X * 2, X / 4, X.abs(), -X, X.bfloat16().to(dtype), X * 0, X.flip(1), X.flip(2), X * torch.nan]
    rows = X.clone()
    rows[:, :, 3] = rows[:, :, 3].flip(1)
    signs = X.clone()
    signs[:, ::2, 3] *= -1
    found = {checksums([Y]).item() for Y in (X, rows, signs, *others)}
    assert len(found) == 3 + len(others)
    assert checksums([X.clone()]) == checksums([X])


def test_the_interval_of_checks_counts():
    model = make_model()
    with pytest.raises(OptimizerError, match="drift_check_interval must be an integer ≥ 0; received -1"):
        attach_manifold_step(torch.optim.SGD(model.parameters(), lr=0.1), model, drift_check_interval=-1)
    with pytest.raises(ConfigError, match="drift_check_interval must be an integer ≥ 0; received -1"):
        CondLRTrainingArguments("out", drift_check_interval=-1)


def test_when_a_check_is_due():
    assert [step for step in range(1, 11) if is_due(step, 4)] == [1, 4, 8]
    assert not any(is_due(step, 0) for step in range(1, 11))
