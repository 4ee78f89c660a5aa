"""What two processes do under torchrun for `test_replicas.py`: plain loops and trainings, and their results."""

import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from transformers import TrainerCallback, set_seed

from hf_condlr import CondLRTrainer, attach_manifold_step
from hf_condlr.errors import CondLRError
from tests.manifold.nets import make_model
from tests.training.tiny import arguments, convert, dense_vit, image_data

STEPS, RESUMED_AT, BATCH = 6, 3, 16
LEARNING_RATE = 2**-6


# --------------------------------------------------------------------------------------------------- plain loops


def loop(
    steps=12,
    *,
    seed=0,
    disturb=None,
    make_optimizer=torch.optim.AdamW,
    wrap=nn.parallel.DistributedDataParallel,
    **options,
):
    """The model after some steps under DDP, each process with its own data; `disturb(model, step)` before each."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = make_optimizer(model.parameters(), lr=LEARNING_RATE)
    attach_manifold_step(optimizer, model, warmup_steps=6, **options)
    wrapped = wrap(model)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(1, steps + 1):
        x, y = torch.randn(8, 2, 5, 5, generator=generator), torch.randint(0, 3, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(x), y).backward()
        if disturb is not None:
            disturb(model, step)
        optimizer.step()
    return model


def largest_difference(model):
    """Between the processes, over all parameters."""
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, values)
    return max((values - theirs).abs().max().item() for theirs in everyone)


def flip_one_bit(model, step):
    """The last bit of one entry, on process 1 alone, between the first check and the next."""
    if step == 2 and dist.get_rank() == 1:
        model.a.U.data.view(torch.int32)[3, 1] ^= 1


def error_of(call):
    """The text of the error that the call raises, or "nothing"."""
    try:
        call()
    except CondLRError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def vanish(model, step):
    """A gradient with which SGD makes a core zero."""
    if step == 3:
        model.b.S.grad = model.b.S.detach() / LEARNING_RATE


def zero(parameters, lr):
    """ZeRO-1: each process steps a part of the parameters and hands it round, before the manifold step."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of its own use of torch.jit

    return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=lr)


def equal(first, second):
    return all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def alone():
    """Each process trains its own model, process 1 for more steps, and none waits for the other."""
    steps = 3 + dist.get_rank()
    model = loop(steps, seed=dist.get_rank(), wrap=lambda model: model, drift_check_interval=0)
    return largest_difference(model)


def loops():
    """{what was done: its result}."""
    plain = loop()
    return {
        "difference between processes": largest_difference(plain),
        "ZeRO-1 equals not sharded": equal(plain, loop(make_optimizer=zero)),
        "different seeds": largest_difference(loop(seed=dist.get_rank())),
        "drift": error_of(lambda: loop(disturb=flip_one_bit, drift_check_interval=4)),
        "drift unseen": error_of(lambda: loop(disturb=flip_one_bit, drift_check_interval=0)),
        "models of their own": alone(),
        "vanished": error_of(lambda: loop(disturb=vanish, make_optimizer=torch.optim.SGD)),
    }


# ------------------------------------------------------------------------------------------------------ the Trainer


def trainer(folder, *, batch_size, callbacks=(), **options):
    """A Trainer of a float64 model on 96 images: six steps of 16 samples over all processes."""
    set_seed(0)
    rows = [row | {"pixel_values": row["pixel_values"].double()} for row in image_data(STEPS * BATCH)]
    args = arguments(
        folder,
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        save_strategy="steps",
        save_steps=RESUMED_AT,
        conditioning_warmup_ratio=0.7,  # the checkpoint lies within the warm-up
        optim="adamw_torch",
        **options,
    )
    return CondLRTrainer(model=convert(dense_vit().double()), args=args, train_dataset=rows, callbacks=list(callbacks))


class WriteOnOneProcess(TrainerCallback):
    """A mistake of a user: weights are changed on one process only."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2 and args.process_index == 1:
            next(p for name, p in model.named_parameters() if name.endswith(".V")).data.mul_(1.001)


def trainings(folder):
    """Uninterrupted, resumed from one process's checkpoint, and with a drift; writes the weights into `folder`."""
    half = BATCH // 2
    uninterrupted = trainer(folder / "two", batch_size=half // 2, gradient_accumulation_steps=2)
    uninterrupted.train()
    resumed = trainer(folder / "resumed", batch_size=half)
    resumed.train(resume_from_checkpoint=str(folder / "one" / f"checkpoint-{RESUMED_AT}"))
    if dist.get_rank() == 0:
        torch.save(uninterrupted.model.state_dict(), folder / "two.pt")
        torch.save(resumed.model.state_dict(), folder / "resumed.pt")
    drifting = trainer(folder / "drifting", batch_size=half, callbacks=[WriteOnOneProcess()], drift_check_interval=2)
    return {"steps": resumed.manifold_step.step_count, "drift in the Trainer": error_of(drifting.train)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = trainings(folder) | loops()
    (folder / f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
