"""Trainings killed by SIGKILL at random moments, and started again until they end: is the result the same, bit for bit?

A small ViT with dropout on random images, `CondLRTrainer`, AdamW, a cosine schedule, a conditioning warm-up, and a
checkpoint every fourth step. One training is not interrupted. Others are killed at random moments and go on with
`resume_from_checkpoint=True`, or start again where there is no checkpoint yet; when one ends, the next one begins,
until there were enough kills. Then the same on two processes (gloo), of which one is killed: how long the other one
lives, and how it ends. Final weights and the states of optimizer, scheduler and conditioning are compared.

    python -m benchmarks.kill_and_resume
    torchrun --nproc_per_node 2 --module benchmarks.kill_and_resume --dies_at 60
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, ViTConfig, ViTForImageClassification

from hf_condlr import CondLRConfig, CondLRTrainer, CondLRTrainingArguments, get_robust_lowrank_model
from hf_condlr.files import replacing
from hf_condlr.options import option
from hf_condlr.tables import markdown_table
from studies.record import parse, set_up, write_record

LONGEST = 600  # seconds that a training may take


@dataclass
class Options:
    """Number of kills, and length of a training."""

    kills: int = option(30, "Kills of trainings on one process.")
    rank_kills: int = option(5, "Kills of one of two processes.")
    steps: int = option(120, "Optimizer steps of a training.")
    dies_at: int = option(0, "Under torchrun: the step at which the last process kills itself.")
    output: str = option("outputs/kill_and_resume.json", "Where the numbers go.")


def train(folder: Path, options: Options, start_seed: int) -> None:
    """Train from the last complete checkpoint to the end, write `final.pt`. `start_seed` must not change the result."""
    transformers.set_seed(0)
    rows = [{"pixel_values": torch.rand(1, 8, 8), "labels": i % 3} for i in range(48)]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, hidden_dropout_prob=0.1, **sizes)
    resumes = last_step(folder) > 0
    torch.manual_seed(start_seed if resumes else 0)  # what is resumed takes nothing from here
    model = get_robust_lowrank_model(ViTForImageClassification(config), CondLRConfig(rank_ratio=0.4, tau=0.1))
    args = CondLRTrainingArguments(
        str(folder),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        conditioning_warmup_ratio=0.5,
        save_steps=4,
        save_total_limit=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = CondLRTrainer(model=model, args=args, train_dataset=rows)
    if options.dies_at:
        trainer.add_callback(Dies(options.dies_at))
    trainer.train(resume_from_checkpoint=resumes)
    if trainer.is_world_process_zero():
        state = {
            "weights": trainer.model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "scheduler": trainer.lr_scheduler.state_dict(),
            "conditioning": trainer.manifold_step.state_dict(),
            "step": trainer.state.global_step,
        }
        with replacing(folder / "final.pt") as temporary:
            torch.save(state, temporary)


class Dies(TrainerCallback):
    """The last process kills itself after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """In a training of several processes."""
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            sys.stderr.write(f"killed at {time.strftime('%X')}\n")
            os.kill(os.getpid(), signal.SIGKILL)


def equal(x: Any, y: Any) -> bool:
    """Whether two nested values are equal bit for bit."""
    if isinstance(x, torch.Tensor):
        return isinstance(y, torch.Tensor) and x.dtype == y.dtype and torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(equal(x[key], y[key]) for key in x)
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(equal, x, y))
    return bool(x == y)


def steps_saved(folder: Path) -> dict[int, bool]:
    """{step of a checkpoint: whether it is complete}: the Trainer writes `trainer_state.json` last."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        step = int(path.name.rpartition("-")[2])
        try:
            found[step] = bool(json.loads((path / "trainer_state.json").read_text()))
        except (OSError, ValueError):
            found[step] = False
    return found


def last_step(folder: Path) -> int:
    """Step of the checkpoint to go on from; 0 without one."""
    return max((step for step, complete in steps_saved(folder).items() if complete), default=0)


def was_saving(folder: Path, since: float) -> bool:
    """Whether the newest checkpoint is not complete and was written to after `since`: the kill came during a save."""
    newest = max(steps_saved(folder), default=0)
    path = folder / f"checkpoint-{newest}"
    return newest > last_step(folder) and path.stat().st_mtime >= since


def start(folder: Path, options: Options, seed: int, processes: int) -> list[int]:
    """Begin the training in copies of this process, whose output goes to files beside `folder`; their ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
    pids = []
    for rank in range(processes):
        pids.append(os.fork())
        if pids[-1] == 0:
            status = 1
            try:
                os.environ.update(group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})
                with folder.with_name(f"{folder.name}-{rank}.log").open("w") as log:
                    os.dup2(log.fileno(), 1)
                    os.dup2(log.fileno(), 2)
                train(folder, options, seed)
                status = 0
            except BaseException as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                sys.stderr.flush()
            os._exit(status)
    return pids


def wait(pid: int, seconds: float) -> int | None:
    """The exit status, negative for a signal; None if it still runs after `seconds`."""
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def kill(pid: int) -> None:
    """Kill a process and wait for its end."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def finish(pids: list[int], folder: Path, status: int = 0) -> None:
    """Wait for the end of the processes, which must succeed; `status` of one that has ended already."""
    if any([status, *(wait(pid, LONGEST) for pid in pids)]):
        raise RuntimeError("".join(log.read_text() for log in folder.parent.glob(f"{folder.name}-*.log")))


def killed_trainings(root: Path, options: Options, processes: int, kills: int) -> dict[str, Any]:
    """Kills of the only process, or of the two in turn; how many trainings ended as the one without kills."""
    moments, whole = random.Random(0), root / f"reference-{processes}"
    began = time.monotonic()
    finish(start(whole, options, 0, processes), whole)
    seconds = time.monotonic() - began
    expected = torch.load(whole / "final.pt", weights_only=True)
    found: dict[str, Any] = {"kills": 0, "while saving": 0, "resumed at": [], "trainings": 0, "equal": 0}
    found |= {"seconds": [], "said": []}
    while found["kills"] < kills or not found["trainings"]:
        folder = root / f"killed-{processes}-{found['trainings']}"
        while not (folder / "final.pt").exists():
            since, pids = time.time(), start(folder, options, 1000 + found["kills"], processes)
            if found["kills"] == kills:
                finish(pids, folder)
                continue
            victim = pids[found["kills"] % processes]
            others = [pid for pid in pids if pid != victim]
            watched = (others or pids)[0]
            # Two processes take the first fifth of the time to find each other.
            status = wait(watched, moments.uniform(0.2 * (processes > 1), 0.65) * seconds)
            if status is not None:
                finish([pid for pid in pids if pid != watched], folder, status)
                continue
            kill(victim)
            began = time.monotonic()
            status = wait(watched, 120) if others else None
            if status == 0:
                continue  # it had nothing left to do with the other one
            if others:
                found["seconds"].append(time.monotonic() - began)
                lines = folder.with_name(f"{folder.name}-{pids.index(watched)}.log").read_text().strip().splitlines()
                found["said"].append(f"{status}: {lines[-1][:120] if lines else ''}")
                if status is None:
                    kill(watched)
            found["kills"] += 1
            found["resumed at"].append(last_step(folder))
            found["while saving"] += was_saving(folder, since)
        found["trainings"] += 1
        found["equal"] += equal(torch.load(folder / "final.pt", weights_only=True), expected)
        shutil.rmtree(folder)
    return found


def main() -> None:
    """Kill, compare, print."""
    (options,) = parse(Options)
    set_up(threads=1)
    logging.disable(logging.WARNING)  # of checkpoints that are not complete
    warnings.simplefilter("ignore")
    if "RANK" in os.environ:
        train(Path(options.output).with_suffix(""), options, 0)
        return
    with tempfile.TemporaryDirectory() as root:
        one = killed_trainings(Path(root), options, 1, options.kills)
        two = killed_trainings(Path(root), options, 2, options.rank_kills)
    rows = []
    for name, found in (("the only process", one), ("one of two", two)):
        seconds = found["seconds"]
        lived = f"{statistics.mean(seconds):.2f} s (longest {max(seconds):.2f})" if seconds else ""
        rows.append([name, found["kills"], found["while saving"], f"{found['equal']} of {found['trainings']}", lived])
    header = ["killed", "kills", "of them while saving", "ended equal bit for bit", "the other process ended after"]
    print(markdown_table(header, rows), *two["said"], sep="\n")
    print("wrote", write_record(options.output, {"one": one, "two": two}, options))


if __name__ == "__main__":
    main()
