"""Checks of checkpoints and of the Trainer on shards, each run by every process; `sharded_processes.py` runs them."""

import copy
import os
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, ViTForImageClassification
from transformers.distributed import DistributedConfig

from hf_condlr import (
    CondLRConfig,
    CondLRTrainer,
    attach_manifold_step,
    condition_report,
    get_robust_lowrank_model,
    load_sharded,
    save_sharded,
)
from hf_condlr.distributed.shards import local
from hf_condlr.errors import CondLRError
from tests.distributed.sharded_models import (
    Net,
    difference,
    full,
    make_model,
    shard,
    sharding_accelerate,
    train,
)
from tests.training.tiny import arguments, convert, dense_vit, image_data


def resumed(folder):
    """Sharded checkpoint in the warm-up: bit for bit the training that was not interrupted; files without pickle."""
    place = Path(folder, f"sharded-{dist.get_world_size()}")

    def start():
        model = shard(make_model())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        return model, optimizer, attach_manifold_step(optimizer, model, warmup_steps=20)

    model, optimizer, handle = start()
    train(model, optimizer, range(6))
    save_sharded(place, model, optimizer, handle)
    save_sharded(place, model, optimizer, handle)  # in place of the first
    train(model, optimizer, range(6, 12))
    again, optimizer_again, handle_again = start()
    load_sharded(place, again, optimizer_again, handle_again)
    train(again, optimizer_again, range(6, 12))
    same = all(torch.equal(full(p), full(q)) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    other_count = Path(folder, "sharded-2")  # written by two processes, before three are started
    load_sharded(other_count, again, optimizer_again, handle_again)
    train(again, optimizer_again, range(6, 12))
    files = sorted(p.suffix for p in place.rglob("*") if p.is_file())
    errors = []
    place.with_name("occupied.partial").touch()
    other = shard(get_robust_lowrank_model(Net(), CondLRConfig(target_modules=["conv", "a"], rank_ratio=0.3)))
    for attempt in (
        lambda: load_sharded(place, other),
        lambda: load_sharded(Path(folder, "none"), again),
        lambda: save_sharded(place.with_name("occupied"), again),
        lambda: save_in_vain(place, again),
    ):
        try:
            attempt()
        except CondLRError as error:
            errors.append(str(error))
    return {
        "same": same,
        "difference": difference(model, again),
        "files": sorted(set(files)),
        "steps": handle_again.step_count,
        "errors": errors,
    }


def save_in_vain(place, model):
    """The first process cannot move what was written to its place."""

    def refuse(*args):
        raise PermissionError("renamed in vain")

    os.rename, rename = refuse, os.rename
    try:
        save_sharded(place, model)
    finally:
        os.rename = rename


def trained(folder):
    """`CondLRTrainer(fsdp=True)`: resumed it is bit for bit the training without an interruption, and loads whole."""
    place = Path(folder, f"trainer-{dist.get_world_size()}")
    dense, rows = dense_vit(), image_data(24)

    def make():
        args = arguments(
            place,
            fsdp=True,
            fsdp_config={"transformer_layer_cls_to_wrap": ["ViTLayer"]},
            per_device_train_batch_size=4,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            logging_steps=2,
            conditioning_warmup_ratio=0.8,
            load_best_model_at_end=False,
        )
        return CondLRTrainer(model=convert(copy.deepcopy(dense)), args=args, train_dataset=rows, eval_dataset=rows[:5])

    with sharding_accelerate():
        trainer = make()
        trainer.train()
        again = make()
        again.train(resume_from_checkpoint=str(place / "checkpoint-2"))
        pairs = zip(trainer.model.parameters(), again.model.parameters(), strict=True)
        same = all(torch.equal(full(p), full(q)) for p, q in pairs)
        again.save_model(str(place / "final"))
        dist.barrier()
    loaded = ViTForImageClassification.from_pretrained(place / "final")
    pairs = zip(again.model.parameters(), loaded.parameters(), strict=True)
    AcceleratorState._reset_state(True)
    try:
        CondLRTrainer(model=convert(dense), args=arguments(place, fsdp=True), train_dataset=rows)
        error = None
    except CondLRError as refusal:
        error = str(refusal)
    return {
        "sharded": isinstance(again.model.vit.layers[0].attention.q_proj.U, DTensor),
        "resumed": same,
        "loaded": all(torch.equal(full(p), q) for p, q in pairs),
        "bounds": sorted(set(again.manifold_step.bounds().values())),
        "logged": sorted(key for key in again.state.log_history[-2] if "kappa" in key),
        "not_sharding": error,
    }


def checkpoints(folder):
    """A factored checkpoint straight into shards, trained, and gathered into one that loads anywhere."""
    place = Path(folder, f"whole-{dist.get_world_size()}")
    sizes = {"hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 2, "num_attention_heads": 2}
    alone = LlamaForCausalLM(LlamaConfig(vocab_size=30, num_key_value_heads=2, **sizes))
    get_robust_lowrank_model(alone, CondLRConfig(rank_ratio=0.4, tau=0.5))
    alone.save_pretrained(place / "start", is_main_process=dist.get_rank() == 0)
    dist.barrier()
    config = DistributedConfig(fsdp_size=dist.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(place / "start", distributed_config=config)
    ids = torch.randint(0, 30, (2, 7))
    with torch.no_grad():
        started = torch.equal(model(ids).logits, alone(ids).logits)
    rows = {name: local(p).shape[0] / p.shape[0] for name, p in model.named_parameters() if name.endswith(".U")}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = attach_manifold_step(optimizer, model)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.save_pretrained(place / "end")
    dist.barrier()
    loaded = AutoModelForCausalLM.from_pretrained(place / "end")
    pairs = zip(model.parameters(), loaded.parameters(), strict=True)
    errors = []
    for attempt in (
        lambda: model.save_pretrained(place / "wrong", state_dict=model.state_dict()),
        lambda: model.save_pretrained(place / "wrong", push_to_hub=True),
        lambda: model.push_to_hub("user/name"),
    ):
        try:
            attempt()
        except CondLRError as refusal:
            errors.append(str(refusal))
    return {
        "started": started,
        "share": max(rows.values()),
        "loaded": all(torch.equal(full(p), q) for p, q in pairs),
        "kappa": condition_report(loaded).max_condition_number / max(handle.bounds().values()),
        "errors": errors,
        "written": (place / "wrong").exists(),
    }
