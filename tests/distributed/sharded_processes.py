"""Runs the checks of factors sharded by `fully_shard` on 2 and on 3 processes, for `test_sharding.py`.

The processes are forked after the imports and meet by a file: one import, no port. Each writes what it measured.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from torch import distributed as dist

from tests.distributed import sharded_checkpoint_checks as checkpoint_checks
from tests.distributed import sharded_step_checks as step_checks
from tests.distributed.sharded_models import shard

CHECKS = {
    "adamw": lambda folder: step_checks.trajectory(steps=20, prepare=shard),
    "sgd": lambda folder: step_checks.trajectory("sgd", steps=6),
    "interval": lambda folder: step_checks.trajectory(interval=3),
    "frozen": lambda folder: step_checks.trajectory("sgd", steps=6, freeze=True),
    "two_dimensions": lambda folder: step_checks.trajectory(steps=6, prepare=step_checks.over_two_dimensions),
    "huge_steps": step_checks.huge_steps,
    "not_finite": step_checks.not_finite,
    "skipped": step_checks.skipped,
    "flags": step_checks.flags,
    "vanished": step_checks.vanished,
    "traffic": step_checks.traffic,
    "half_precision": step_checks.half_precision,
    "evaluated_between": step_checks.evaluated_between,
    "report": step_checks.report,
    "foreign": step_checks.foreign,
    "resumed": checkpoint_checks.resumed,
    "refused": step_checks.refused,
    "accelerated": step_checks.accelerated,
    "trained": checkpoint_checks.trained,
    "checkpoints": checkpoint_checks.checkpoints,
}


# On 3 processes some hold no rows; the other checks ask nothing more of them.
OF_THREE = {"adamw", "interval", "huge_steps", "not_finite", "report", "foreign", "resumed"}


def run_checks(folder, only):
    results = {}
    for name, check in CHECKS.items():
        if name in only or (not only and (dist.get_world_size() == 2 or name in OF_THREE)):
            torch.manual_seed(0)
            results[name] = check(folder)
    return results


def process(rank, size, folder, only):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{size}", rank=rank, world_size=size)
    results = run_checks(folder, only)
    Path(folder, f"results-{size}-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def fork_all(size, folder, only):
    """Whether all processes succeeded; the first that fails ends the others, which would wait for it."""
    children = []
    for rank in range(size):
        child = os.fork()
        if not child:
            try:
                process(rank, size, folder, only)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(1)
        children.append(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            return False
    return True


if __name__ == "__main__":
    where, sizes, wanted = sys.argv[1], sys.argv[2].split(","), sys.argv[3:]
    sys.exit(0 if all(fork_all(int(size), where, wanted) for size in sizes) else 1)
