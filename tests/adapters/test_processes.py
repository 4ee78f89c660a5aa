"""An adapter under DDP: two processes train as one does, and hold the same factors bit for bit."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters import adapter_processes
from tests.paths import ROOT

pytestmark = pytest.mark.processes

TOLERANCE = 1e-8  # float64, six steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    adapter_processes.train(folder, batch_size=adapter_processes.BATCH, name="one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, adapter_processes.__name__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", ["two", "accumulated"])
def test_two_processes_train_as_one(folder, name):
    one, two = (load_file(folder / f"{n}-0.safetensors") for n in ("one", name))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, two[key], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["two", "accumulated", "different"])
def test_both_hold_the_same_factors(folder, name):
    """Also where each process drew a start of its own: DDP begins with process 0's."""
    first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(value, second[key]) for key, value in first.items())
