"""Small models sharded by `fully_shard`, their training, and what is measured of them."""

import math
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from hf_condlr import (
    CondLRConfig,
    get_robust_lowrank_model,
)
from hf_condlr.layers import factored_layers
from hf_condlr.linalg import condition_number, orthonormality_error

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
