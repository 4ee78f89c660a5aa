"""Factors sharded by `fully_shard` on 2 and on 3 processes, as `test_sharding.py` starts it: what each check measured.

The processes are forked after the imports, and meet by a file: one import, no port.
"""

import copy
import json
import math
import os
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
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
from hf_condlr.distributed.collectives import anywhere
from hf_condlr.distributed.rows import local, reshard
from hf_condlr.errors import CondLRError
from hf_condlr.layers import factored_layers
from hf_condlr.linalg import condition_number, orthonormality_error
from hf_condlr.manifold import bases
from tests.training.tiny import arguments, convert, dense_vit, image_data

ROWS = 12  # of a batch, of all processes together


class Net(nn.Module):
    """Shapes of which 2 or 3 processes hold unequal shares of rows, or none: 13, 4 and 1, cores of 5, 2 and 1."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.a, self.b = nn.Linear(4, 13), nn.Linear(13, 13)
        self.c, self.narrow = nn.Linear(13, 4), nn.Linear(4, 6)
        self.dense = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.tanh(self.conv(x)).mean((2, 3))
        for layer in (self.a, self.b, self.c, self.narrow):
            x = torch.tanh(layer(x)) + 0.1
        return self.dense(x)


def make_model(tau=0.1):
    torch.manual_seed(0)
    config = CondLRConfig(
        target_modules=["conv", "a", "b", "c", "narrow"],
        rank_ratio=0.4,
        rank_pattern={"narrow": 1, "conv": 3},
        tau=tau,
    )
    return get_robust_lowrank_model(Net(), config)


def shard(model, **options):
    """Each layer a unit of its own, and the rest."""
    for layer in factored_layers(model).values():
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 2, 5, 5, generator=generator), torch.randint(0, 3, (ROWS,), generator=generator)


def own_part(x):
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def backward(model, step, part):
    x, y = batch(step)
    nn.functional.cross_entropy(model(part(x)), part(y)).backward()


def train(model, optimizer, steps, part=own_part):
    for step in steps:
        optimizer.zero_grad()
        backward(model, step, part)
        optimizer.step()


def full(p):
    p = p.detach()
    return p.full_tensor() if hasattr(p, "full_tensor") else p


def violations(model, handle):
    """The largest ‖UᵀU − I‖_F / (1e-5 √r) and κ(S) / bound of all layers; every process must ask."""
    worst = [0.0, 0.0]
    for name, layer in factored_layers(model).items():
        for basis in (layer.U, layer.V):
            worst[0] = max(worst[0], orthonormality_error(full(basis)).item() / (1e-5 * math.sqrt(layer.r)))
        worst[1] = max(worst[1], condition_number(full(layer.S)).item() / handle.bounds()[name])
        assert layer.bound == handle.bounds()[name], name
    return worst


def difference(model, other):
    """The largest relative difference of W."""
    worst = 0.0
    for name, layer in factored_layers(model).items():
        reference = other.get_submodule(name)
        U, S, V = (full(p).double() for p in (layer.U, layer.S, layer.V))
        U_, S_, V_ = (full(p).double() for p in (reference.U, reference.S, reference.V))
        W, expected = U @ S @ V.mT, U_ @ S_ @ V_.mT
        worst = max(worst, ((W - expected).norm() / expected.norm()).item())
    return worst


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
}


def trajectory(optimizer="adamw", steps=9, interval=1, freeze=False, prepare=fully_shard):
    """Some steps, sharded and alone on the joined batch: what W differs by, and the guarantee of the sharded one."""
    alone = make_model()
    if freeze:
        train_to_bound(alone)
    model = prepare(copy.deepcopy(alone))
    worst = [0.0, 0.0]
    for m, part in ((alone, lambda x: x), (model, own_part)):
        made = OPTIMIZERS[optimizer](m.parameters())
        handle = attach_manifold_step(made, m, warmup_steps=6, projection_interval=interval)
        for step in range(steps):
            train(m, made, [step], part)
            if m is model and (step + 1) % 3 == 0:
                worst = [max(pair) for pair in zip(worst, violations(m, handle), strict=True)]
        handle.settle()
    worst = [max(pair) for pair in zip(worst, violations(model, handle), strict=True)]
    return {"difference": difference(model, alone), "orthonormality": worst[0], "kappa": worst[1]}


def train_to_bound(model):
    """Condition the cores, then freeze two of them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = attach_manifold_step(optimizer, model)
    train(model, optimizer, [0], lambda x: x)
    handle.remove()
    for layer in (model.a, model.c):
        layer.S.requires_grad_(False)


def over_two_dimensions(model):
    """Replicas of shards, where 2 processes allow one replica."""
    return shard(model, mesh=init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("copies", "rows")))


def huge_steps(folder):
    """Steps that leave nothing of the factors: the guarantee, and whether QR by rows was needed."""
    worst = [0.0, 0.0]
    joins = []
    bases.joined_qr, joined_qr = lambda *args: joins.append(1) or joined_qr(*args), bases.joined_qr
    for lr in (10.0, 1e20):
        for make in (torch.optim.SGD, torch.optim.AdamW):
            model = shard(make_model())
            optimizer = make(model.parameters(), lr=lr)
            handle = attach_manifold_step(optimizer, model)
            for step in range(2):
                for i, p in enumerate(model.parameters()):
                    torch.manual_seed(100 * step + i)
                    p.grad = distribute_tensor(torch.randn(p.shape), p.device_mesh, p.placements)
                optimizer.step()
                worst = [max(pair) for pair in zip(worst, violations(model, handle), strict=True)]
    bases.joined_qr = joined_qr
    return {"orthonormality": worst[0], "kappa": worst[1], "joined": len(joins)}


def not_finite(folder):
    """A gradient that is not finite on the last process alone holds its factor on all of them."""
    model = shard(make_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = attach_manifold_step(optimizer, model)
    train(model, optimizer, [0])
    before = {name: full(p).clone() for name, p in model.named_parameters()}
    moments = {name: full(optimizer.state[p]["exp_avg"]).clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    backward(model, 1, own_part)
    if dist.get_rank() == 0:
        model.a.U.grad.to_local()[0, 0] = math.nan
        model.b.S.grad.to_local()[0, 1] = math.inf
    optimizer.step()
    same = sorted(name for name, p in model.named_parameters() if torch.equal(full(p), before[name]))
    decayed = {
        name: torch.allclose(full(optimizer.state[p]["exp_avg"]), 0.9 * moments[name], atol=0)
        for name, p in model.named_parameters()
    }
    return {
        "held": same,
        "decayed": sorted(name for name, alike in decayed.items() if alike),
        "kappa": violations(model, handle)[1],
    }


def skipped(folder):
    """A gradient scaler that finds an overflow on one process skips the step, of a fused optimizer too, on all."""
    model = shard(make_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    handle = attach_manifold_step(optimizer, model)
    train(model, optimizer, range(2))
    before = [full(p).clone() for p in model.parameters()]
    optimizer.zero_grad()
    backward(model, 2, own_part)
    if dist.get_rank() == 1:
        model.a.U.grad.to_local()[0, 0] = math.inf
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.zeros(1))
    scaler.step(optimizer)
    scaler.update()
    same = all(torch.equal(full(p), q) for p, q in zip(model.parameters(), before, strict=True))
    return {"same": same, "steps": handle.step_count, "scale": scaler.get_scale()}


def flags(folder):
    """A flag of each process alone, on meshes of one dimension and of two: whether all see it, and none without."""
    size = dist.get_world_size()
    seen = []
    for shape in ((size,), (1, size), (size, 1)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "rows")[-len(shape) :])
        parameters = list(shard(make_model(), mesh=mesh).parameters())
        seen += [[anywhere(dist.get_rank() == rank, parameters) for rank in range(size + 1)]]
    return seen


def vanished(folder):
    """An update that makes a core zero is refused by all processes, and undone."""
    model = shard(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    handle = attach_manifold_step(optimizer, model)
    train(model, optimizer, [0])
    before = full(model.b.S).clone()
    optimizer.zero_grad()
    backward(model, 1, own_part)
    model.b.S.grad = model.b.S.detach().clone()
    try:
        optimizer.step()
    except CondLRError as error:
        return {
            "error": str(error),
            "kept": torch.equal(full(model.b.S), before),
            "kappa": violations(model, handle)[1],
        }
    return {"error": None}


def traffic(folder):
    """All-reduces of one step and their bytes, beside 4 (9 r² + 12) for each layer; nothing else is communicated."""
    model = shard(make_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    attach_manifold_step(optimizer, model, metric_scaling=False)
    train(model, optimizer, [0])
    optimizer.zero_grad()
    backward(model, 1, own_part)
    sent = []
    dist.all_reduce, all_reduce = lambda X, **kwargs: sent.append(X.nbytes) or all_reduce(X, **kwargs), dist.all_reduce
    with CommDebugMode() as others:
        optimizer.step()
    dist.all_reduce = all_reduce
    expected = sum(4 * (9 * layer.r**2 + 12) for layer in factored_layers(model).values())
    return {
        "calls": len(sent),
        "bytes": sum(sent),
        "expected": expected,
        "others": others.get_total_counts() - len(sent),
    }


def half_precision(folder):
    """Forward and backward in bfloat16 keep shards in float32, and the guarantee."""
    model = shard(make_model(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = attach_manifold_step(optimizer, model)
    train(model, optimizer, range(5))
    with torch.no_grad():
        output = model(own_part(batch(0)[0]))  # without a backward the root holds its whole parameters in bfloat16
    report = condition_report(model)
    return {
        "computed_in": str(output.dtype),
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
        "reported": report.max_orthonormality_error,
        "orthonormality": violations(model, handle)[0],
        "kappa": violations(model, handle)[1],
    }


def evaluated_between(folder):
    """A forward between backward and step, after which the root does not hold its shards, changes nothing."""
    models = [fully_shard(make_model()) for _ in range(2)]
    for model in models:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        attach_manifold_step(optimizer, model)
        for step in range(3):
            optimizer.zero_grad()
            backward(model, step, own_part)
            if model is models[0]:
                with torch.no_grad():
                    model(own_part(batch(9)[0]))
            optimizer.step()
    for model in models:
        reshard(model)
    return {"difference": difference(*models), "changed": difference(models[0], make_model())}


def report(folder):
    """`condition_report` of shards, beside that of the same model whole; of factors that are not orthonormal, too."""
    model = make_model()
    with torch.no_grad():
        model.a.U.mul_(2.0).add_(torch.linspace(0, 0.3, model.a.U.numel()).view_as(model.a.U))
    expected = condition_report(model).to_dict()
    found = condition_report(shard(model)).to_dict()
    return {"found": found, "expected": expected}


def foreign(folder):
    """Bases that are not orthonormal become so when the step is attached, and W stays."""
    alone = make_model()
    with torch.no_grad():
        alone.a.U.mul_(2.0).add_(torch.linspace(0, 0.3, alone.a.U.numel()).view_as(alone.a.U))
        alone.conv.V.copy_(alone.conv.V.bfloat16())
    model = shard(copy.deepcopy(alone))
    handle = attach_manifold_step(torch.optim.SGD(model.parameters(), lr=0.1), model)
    worst = max(record.orthonormality_error / math.sqrt(record.r) for record in condition_report(model).layers)
    return {"difference": difference(model, alone), "orthonormality": worst, "steps": handle.step_count}


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


def refused(folder):
    """Other shardings, at the start."""
    model = get_robust_lowrank_model(Net(), CondLRConfig(target_modules=["b"], r=6))
    fully_shard(model.b, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else None)
    try:
        attach_manifold_step(torch.optim.SGD(model.parameters(), lr=0.1), model)
    except CondLRError as error:
        return {"error": str(error)}
    return {"error": None}


@contextmanager
def sharding_accelerate():
    """accelerate shards on GPUs only, and takes DDP elsewhere; told that this is FSDP, it does here as there."""
    original = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if self._shared_state.get("fsdp_plugin") is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState._reset_state(True)
    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = original
        AcceleratorState._reset_state(True)


def accelerated(folder):
    """Attached before `accelerator.prepare`, which makes every parameter anew; beside one process."""
    alone = make_model()
    model = copy.deepcopy(alone)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handle = attach_manifold_step(optimizer, model, warmup_steps=10)
    with sharding_accelerate():
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LowRankLinear"],
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT",
        )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        model, optimizer = accelerator.prepare(model, optimizer)
        train(model, optimizer, range(10))
    reference = torch.optim.AdamW(alone.parameters(), lr=0.01)
    attach_manifold_step(reference, alone, warmup_steps=10)
    train(alone, reference, range(10), lambda x: x)
    worst = violations(model, handle)
    sharded = all(isinstance(p, DTensor) for p in model.parameters())
    return {"difference": difference(model, alone), "orthonormality": worst[0], "kappa": worst[1], "sharded": sharded}


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


CHECKS = {
    "adamw": lambda folder: trajectory(steps=20, prepare=shard),
    "sgd": lambda folder: trajectory("sgd", steps=6),
    "interval": lambda folder: trajectory(interval=3),
    "frozen": lambda folder: trajectory("sgd", steps=6, freeze=True),
    "two_dimensions": lambda folder: trajectory(steps=6, prepare=over_two_dimensions),
    "huge_steps": huge_steps,
    "not_finite": not_finite,
    "skipped": skipped,
    "flags": flags,
    "vanished": vanished,
    "traffic": traffic,
    "half_precision": half_precision,
    "evaluated_between": evaluated_between,
    "report": report,
    "foreign": foreign,
    "resumed": resumed,
    "refused": refused,
    "accelerated": accelerated,
    "trained": trained,
    "checkpoints": checkpoints,
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
