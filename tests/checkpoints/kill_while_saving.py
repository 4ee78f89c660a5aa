"""Processes that are killed while they save, and one whose disk is full; `test_publish.py` runs it.

    python -m tests.checkpoints.kill_while_saving FOLDER

A process of its own, because a copy made by fork holds only the thread that made it: here nothing starts another one
in the parent. Prints what was found as JSON.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from transformers.utils import logging

from hf_condlr import CondLRConfig, get_robust_lowrank_model
from hf_condlr.errors import CheckpointError
from tests import models

KILLS = 8


def in_a_child(action):
    """Run it in a copy of this process; returns its id. The child's exit status is what `action` returns."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(action() or 0)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__} {error}\n")
            sys.stderr.flush()
            os._exit(99)
    return pid


def status_of(action):
    return os.waitstatus_to_exitcode(os.waitpid(in_a_child(action), 0)[1])


def main(folder):
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    twins = [get_robust_lowrank_model(models.vit(), CondLRConfig(rank_ratio=0.5)) for _ in range(2)]
    with torch.no_grad():
        twins[1].classifier.bias += 1
    twins[0].save_pretrained(folder)

    def save_for_ever():
        while True:
            for model, size in zip(twins, ("1GB", "5KB"), strict=True):
                model.save_pretrained(folder, max_shard_size=size)

    def load():
        """Which of the two it is; anything else is an error."""
        found = type(twins[0]).from_pretrained(folder).state_dict()
        same = [all(torch.equal(found[key], value) for key, value in model.state_dict().items()) for model in twins]
        return same.index(True)

    generator = torch.Generator().manual_seed(0)
    found, in_a_save = [], 0
    for _ in range(KILLS):
        pid = in_a_child(save_for_ever)
        time.sleep(0.02 + 0.3 * torch.rand((), generator=generator).item())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        in_a_save += any(path.name.startswith(".condlr-") for path in folder.iterdir())
        found.append(status_of(load))
    twins[0].save_pretrained(folder)
    files = sorted(path.name for path in folder.iterdir())

    def save_with_no_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            twins[1].save_pretrained(folder)
        except CheckpointError as error:
            (folder.parent / "message").write_text(str(error))
            return 7
        return 0

    status = status_of(save_with_no_room)
    message = (folder.parent / "message").read_text() if status == 7 else ""
    after = status_of(load)
    result = {"found": found, "in_a_save": in_a_save, "files": files, "full": message, "after": after}
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
