"""Factors sharded by FSDP2: the same training as on one process, with the same guarantee, and no basis gathered.

All checks of several processes run once, in `sharded_processes.py`; these tests read what they measured.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from hf_condlr import LowRankLinear, attach_manifold_step
from hf_condlr.errors import OptimizerError
from hf_condlr.training.engines import check_engine
from tests.paths import ROOT

pytestmark = pytest.mark.processes

SIZES = (2, 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{number of processes: {check: what the first process measured}}; all processes measured the same."""
    folder = tmp_path_factory.mktemp("sharded")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.distributed.sharded_processes", str(folder), "2,3"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for size in SIZES:
        ranks = [json.loads((folder / f"results-{size}-{rank}.json").read_text()) for rank in range(size)]
        assert all(rank == ranks[0] for rank in ranks), size
        found[size] = ranks[0]
    return found


TRAJECTORIES = [(2, "adamw"), (3, "adamw"), (2, "sgd"), (2, "interval"), (3, "interval"), (2, "frozen")]


@pytest.mark.parametrize(("size", "name"), [*TRAJECTORIES, (2, "two_dimensions")])
def test_sharded_training_equals_one_process(results, size, name):
    """W after 6 to 20 steps, through a warm-up: within 1e-5 relative (measured: at most 3.3e-7), unequal shares."""
    found = results[size][name]
    assert found["difference"] <= 1e-5
    assert found["orthonormality"] <= 1  # in units of 1e-5 √r (measured: 0.03)
    assert found["kappa"] <= 1 + 1e-4  # of the bound (measured: 1 + 9e-7)


@pytest.mark.parametrize("size", SIZES)
def test_guarantee_at_absurd_learning_rates(results, size):
    """By QR of the rows, where the Gram matrix has no Cholesky factor to trust."""
    found = results[size]["huge_steps"]
    assert found["joined"] > 0
    assert found["orthonormality"] <= 1
    assert found["kappa"] <= 1 + 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_what_is_not_finite_on_one_process_holds_the_factor_on_all(results, size):
    found = results[size]["not_finite"]
    assert found["held"] == ["a.U", "b.S"]
    assert found["decayed"] == ["a.U", "b.S"]  # moments that saw no gradient, on any process
    assert found["kappa"] <= 1 + 1e-4


def test_overflow_on_one_process_skips_the_step_on_all(results):
    assert results[2]["skipped"] == {"same": True, "steps": 2, "scale": 1.0}


def test_flag_of_one_process_is_seen_by_all_on_meshes_of_one_and_two_dimensions(results):
    assert results[2]["flags"] == [[True, True, False]] * 3


def test_vanishing_core_is_refused_by_all_and_undone(results):
    found = results[2]["vanished"]
    assert "a core S must not vanish" in found["error"]
    assert "after step 2 in b." in found["error"]
    assert found["kept"]
    assert found["kappa"] <= 1 + 1e-4


def test_a_step_sends_blocks_of_r_by_r_in_four_all_reduces(results):
    found = results[2]["traffic"]
    assert found["calls"] == 5
    assert found["bytes"] == found["expected"] + 4  # whether others have written factors
    assert found["others"] == 0


def test_mixed_precision_keeps_float32_shards_and_the_guarantee(results):
    found = results[2]["half_precision"]
    assert found["computed_in"] == "torch.bfloat16"
    assert found["dtypes"] == ["torch.float32"]
    assert found["reported"] <= 1e-5
    assert found["orthonormality"] <= 1
    assert found["kappa"] <= 1 + 1e-4


def test_evaluating_between_backward_and_step_changes_nothing(results):
    assert results[2]["evaluated_between"]["difference"] == 0
    assert results[2]["evaluated_between"]["changed"] > 1e-2


@pytest.mark.parametrize("size", SIZES)
def test_report_of_shards_is_that_of_the_whole(results, size):
    found, expected = results[size]["report"]["found"], results[size]["report"]["expected"]
    for layer, reference in zip(found.pop("layers"), expected.pop("layers"), strict=True):
        for key in ("condition_number", "orthonormality_error", "singular_values"):
            assert layer.pop(key) == pytest.approx(reference.pop(key), rel=1e-6, abs=1e-12), key
        assert layer == reference
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("size", SIZES)
def test_bases_that_are_not_orthonormal_become_so_and_w_stays(results, size):
    found = results[size]["foreign"]
    assert found["orthonormality"] <= 1e-5
    assert found["difference"] <= 1e-6  # measured: 5e-8


@pytest.mark.parametrize("size", SIZES)
def test_sharded_checkpoint_resumes_bitwise_and_on_another_number_of_processes(results, size):
    found = results[size]["resumed"]
    assert found["same"]
    assert found["difference"] <= 1e-5  # measured: 3e-7 from two processes to three
    assert found["steps"] == 12
    assert found["files"] == [".json", ".safetensors"]
    other, missing, *unwritable = found["errors"]
    assert "received factors of b there or here only, factors of c" in other
    assert "completely; received" in missing and "No such file" in missing
    for error, reason in zip(unwritable, ("Not a directory", "renamed in vain"), strict=True):  # of the first process
        assert "completely; received" in error and reason in error


def test_attached_before_accelerate_shards_it_is_the_same_training(results):
    found = results[2]["accelerated"]
    assert found["sharded"]
    assert found["difference"] <= 1e-5  # measured: 2.4e-7
    assert found["orthonormality"] <= 1
    assert found["kappa"] <= 1 + 1e-4


def test_trainer_shards_resumes_and_saves(results):
    found = results[2]["trained"]
    assert found["sharded"]
    assert found["resumed"]
    assert found["loaded"]
    assert found["bounds"] == pytest.approx([1.1])
    assert "eval_kappa_max" in found["logged"]


def test_fsdp_that_accelerate_would_not_do_is_refused(results):
    assert "fsdp=True must shard" in results[2]["trained"]["not_sharding"]
    assert "received fsdp=True on cpu" in results[2]["trained"]["not_sharding"]


def test_checkpoint_goes_straight_into_shards_and_comes_back_whole(results):
    found = results[2]["checkpoints"]
    assert found["started"]
    assert found["share"] == 0.5
    assert found["loaded"]
    assert found["kappa"] <= 1 + 1e-4
    shards, *uploads = found["errors"]
    assert "a state_dict to be written must hold full tensors" in shards
    assert len(uploads) == 2
    assert all("since one process uploads it; received shards. Call save_pretrained" in e for e in uploads)
    assert not found["written"]


def test_other_shardings_are_refused(results):
    error = results[2]["refused"]["error"]
    assert "factors must be sharded by rows, Shard(0)" in error
    assert "without a shard_placement_fn" in error


# ------------------------------------------------------------------------------------------------ on one process


def partitioned(cls):
    """As DeepSpeed names its own, and hides parameters in them."""
    return type(cls.__name__, (cls,), {"__module__": "deepspeed.runtime.zero.stage3"})


class ZeroOptimizer(torch.optim.SGD):
    pass


class Engine(nn.Sequential):
    pass


class FSDP1(FullyShardedDataParallel):
    def __init__(self, module):
        nn.Module.__init__(self)
        self._fsdp_wrapped_module = module


def test_deepspeed_optimizer_is_refused():
    layer = LowRankLinear(8, 6, 3)
    optimizer = partitioned(ZeroOptimizer)(layer.parameters(), lr=0.1)
    with pytest.raises(OptimizerError, match=r"ZeRO steps flattened partitions.*received ZeroOptimizer\. Use FSDP2"):
        attach_manifold_step(optimizer, layer)
    with pytest.raises(OptimizerError, match=r"ZeRO.*received ZeroOptimizer"):
        attach_manifold_step(SimpleNamespace(optimizer=optimizer), layer)


def test_deepspeed_engine_and_its_parameters_are_refused():
    layer = LowRankLinear(8, 6, 3)
    with pytest.raises(OptimizerError, match=r"ZeRO.*received Engine"):
        attach_manifold_step(torch.optim.SGD(layer.parameters(), lr=0.1), partitioned(Engine)(layer))
    layer.U.ds_id = 0
    with pytest.raises(OptimizerError, match=r"ZeRO.*received LowRankLinear"):
        attach_manifold_step(torch.optim.SGD(layer.parameters(), lr=0.1), layer)


def test_fsdp1_is_refused():
    layer = LowRankLinear(8, 6, 3)
    with pytest.raises(OptimizerError, match=r"FSDP1 flattens them; received FSDP1\. Use FSDP2"):
        attach_manifold_step(torch.optim.SGD(layer.parameters(), lr=0.1), FSDP1(layer))


def test_flattened_factors_are_refused():
    layer = LowRankLinear(8, 6, 3)
    layer.U = nn.Parameter(layer.U.detach().flatten())
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(OptimizerError, match=r"a wrapper has flattened; received \.U of 1 dimensions"):
        attach_manifold_step(optimizer, layer)


FULL = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False}


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"fsdp_version": 1}, "FSDP1 flattens them"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "no pickle.*received SHARDED_STATE_DICT"),
        ({"cpu_ram_efficient_loading": True}, "every process must hold the weights.*received cpu_ram_efficient"),
    ],
)
def test_options_of_fsdp_that_break_factors_are_refused(options, match):
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**(FULL | options)))
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, state=state)
    with pytest.raises(OptimizerError, match=match):
        check_engine(SimpleNamespace(fsdp=True), accelerator)
    state.fsdp_plugin = SimpleNamespace(**FULL)
    check_engine(SimpleNamespace(fsdp=True), accelerator)


def test_fsdp_of_the_environment_that_accelerate_would_not_do_is_refused(monkeypatch):
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.MULTI_CPU, state=SimpleNamespace(), device=torch.device("cpu")
    )
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    check_engine(SimpleNamespace(fsdp=False), accelerator)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(OptimizerError, match=r"must shard.*received ACCELERATE_USE_FSDP=true on cpu\. Leave fsdp out"):
        check_engine(SimpleNamespace(fsdp=False), accelerator)


def test_trainer_refuses_deepspeed():
    accelerator = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(OptimizerError, match=r"ZeRO.*received DeepSpeed\. Use FSDP2"):
        check_engine(SimpleNamespace(fsdp=False), accelerator)
