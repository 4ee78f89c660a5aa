"""Checks of the manifold step on shards, each run by every process; `sharded_processes.py` runs them."""

import copy
import math

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from hf_condlr import (
    CondLRConfig,
    attach_manifold_step,
    condition_report,
    get_robust_lowrank_model,
)
from hf_condlr.distributed import sharded_linalg
from hf_condlr.distributed.collectives import anywhere
from hf_condlr.distributed.shards import reshard
from hf_condlr.errors import CondLRError
from hf_condlr.layers import factored_layers
from tests.distributed.sharded_models import (
    Net,
    backward,
    batch,
    difference,
    full,
    make_model,
    own_part,
    shard,
    sharding_accelerate,
    train,
    violations,
)

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
    joined_qr = sharded_linalg.joined_qr
    sharded_linalg.joined_qr = lambda *args: joins.append(1) or joined_qr(*args)
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
    sharded_linalg.joined_qr = joined_qr
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
        seen += [[bool(anywhere(dist.get_rank() == rank, parameters)) for rank in range(size + 1)]]
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
    """All-reduces of one step and their bytes, beside 4 (9 r² + 10) for each layer; nothing else is communicated."""
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
    expected = sum(4 * (9 * layer.r**2 + 10) for layer in factored_layers(model).values())
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


def refused(folder):
    """Other shardings, at the start."""
    model = get_robust_lowrank_model(Net(), CondLRConfig(target_modules=["b"], r=6))
    fully_shard(model.b, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 else None)
    try:
        attach_manifold_step(torch.optim.SGD(model.parameters(), lr=0.1), model)
    except CondLRError as error:
        return {"error": str(error)}
    return {"error": None}


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
