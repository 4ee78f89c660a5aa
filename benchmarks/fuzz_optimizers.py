"""The optimizers that `fuzz.py` puts the manifold step around."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers.optimization import Adafactor


class Lion(torch.optim.Optimizer):
    """Sign of a momentum, Chen et al. 2023 (arXiv 2302.06675): the largest displacement for its gradients."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    update = (0.9 * m + 0.1 * p.grad).sign_()
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
                    m.lerp_(p.grad, 0.01)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=wd),
    "nesterov": lambda p, lr, wd: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True, weight_decay=wd),
    "adamw": lambda p, lr, wd: torch.optim.AdamW(p, lr=lr, weight_decay=wd, foreach=False),
    "adamw-foreach": lambda p, lr, wd: torch.optim.AdamW(p, lr=lr, weight_decay=wd, foreach=True),
    "adamw-fused": lambda p, lr, wd: torch.optim.AdamW(p, lr=lr, weight_decay=wd, fused=True),
    "amsgrad": lambda p, lr, wd: torch.optim.AdamW(p, lr=lr, weight_decay=wd, amsgrad=True),
    "adafactor": lambda p, lr, wd: Adafactor(p, lr=lr, relative_step=False, weight_decay=wd),
    "adafactor-relative": lambda p, lr, wd: Adafactor(p, lr=None, warmup_init=True, beta1=0.9),
    "adafactor-torch": lambda p, lr, wd: torch.optim.Adafactor(p, lr=lr, weight_decay=wd),
    "rmsprop": lambda p, lr, wd: torch.optim.RMSprop(p, lr=lr, momentum=0.5),
    "rmsprop-centered": lambda p, lr, wd: torch.optim.RMSprop(p, lr=lr, centered=True),
    "adagrad": lambda p, lr, wd: torch.optim.Adagrad(p, lr=lr),
    "nadam": lambda p, lr, wd: torch.optim.NAdam(p, lr=lr),
    "radam": lambda p, lr, wd: torch.optim.RAdam(p, lr=lr),
    "adamax": lambda p, lr, wd: torch.optim.Adamax(p, lr=lr),
    "adadelta": lambda p, lr, wd: torch.optim.Adadelta(p, lr=lr),
    "rprop": lambda p, lr, wd: torch.optim.Rprop(p, lr=lr),
    "asgd": lambda p, lr, wd: torch.optim.ASGD(p, lr=lr),
    "lion": lambda p, lr, wd: Lion(p, lr=lr, weight_decay=wd),
}
