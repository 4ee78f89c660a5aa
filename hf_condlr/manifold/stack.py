"""Factors of equal shape as one stack (L, m, r): their values around an optimizer's step, and which are usable."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_condlr.distributed.collectives import Work
from hf_condlr.distributed.rows import layout, local, local_gradient, rows_of, version
from hf_condlr.linalg import per_matrix
from hf_condlr.manifold.masks import count, finite, select, squarable, surely_all


class Stack:
    """Parameters of equal shape, dtype, device and sharding, with their values before the optimizer's step.

    Attributes:
        rows: Which of the m rows are this process's own: all of them, unless the parameters are sharded.
        entries: Of the r×r blocks of all its matrices.
        start: Values at the last projection, (L, m, r), which obey the constraint if they are ours; held from there to
            the next one. Of own rows, as everything but cores while they are conditioned.
        old: Values before the step, the same in the first one.
        usable: (L,) bool: gradient and update are finite. A factor that is not keeps its old value, on all processes.
        held_at: (L,) int64: the first step since `held` was asked at which a factor was not usable, 0 if it always was.
        ours: The factors are what the last projection of this stack wrote.
    """

    start: Tensor
    old: Tensor
    usable: Tensor

    def __init__(self, names: list[str], parameters: list[nn.Parameter]) -> None:
        self.names, self.parameters = names, parameters
        self.rows = rows_of(parameters[0])
        self.entries = len(parameters) * parameters[0].shape[-1] ** 2
        self.held_at = torch.zeros(len(parameters), dtype=torch.int64, device=parameters[0].device)
        self.ours = False
        self._written: list[int] = []

    def begin_interval(self) -> None:
        """Before the first step since the projection: keep what it finds."""
        self.start = self._values()
        self.ours = self._written == self._versions()
        self.begin_step()

    def begin_step(self) -> None:
        """Before a further step. Copies follow factors that were moved or converted since."""
        self.old = self._values()
        self.start, self.held_at = self.start.to(self.old), self.held_at.to(self.old.device)
        self.usable = torch.ones_like(self.held_at, dtype=torch.bool)

    def end_interval(self) -> None:
        """After the projection: no copy is kept."""
        del self.start, self.old
        self._written = self._versions()

    def hold_update(self) -> Work:
        """After a step that no projection follows: factors that are not usable go back to their old values."""
        new, flags = self._update()
        yield flags
        self._accept(new, *flags)

    def _update(self) -> tuple[Tensor, list[Tensor]]:
        """The values after the step, a fresh tensor, and a list of the flags of those that are not usable."""
        new = self._values()
        return new, [count(self.usable.logical_not() | finite(new).logical_not(), new)]

    def _accept(self, new: Tensor, unusable: Tensor) -> Tensor:
        """The values after the step, of which those that are not usable on some process are the old ones again."""
        self.usable = unusable == 0
        if not surely_all(self.usable):
            new = torch.where(per_matrix(self.usable), new, self.old)
            self._write(new)
        self.old = self.start  # no copy is kept over forward and backward
        return new

    def record(self, step: int) -> None:
        """Note which factors step number `step` held; `held` reads it."""
        self.held_at = torch.where(self.usable.logical_not() & (self.held_at == 0), step, self.held_at)

    def held(self) -> dict[str, int]:
        """{factor: first step at which it kept its old value}, and forget it. Waits for the device."""
        found = {name: step for name, step in zip(self.names, self.held_at.tolist(), strict=True) if step}
        self.held_at = torch.zeros_like(self.held_at)
        return found

    def _versions(self) -> list[int]:
        """Torch counts what is written into a tensor."""
        return [version(p) for p in self.parameters]

    def _own(self) -> list[Tensor]:
        """The own rows of the parameters; writing into them writes into these."""
        plain = layout(self.parameters[0]) is None
        return list(self.parameters) if plain else [local(p) for p in self.parameters]

    def _values(self) -> Tensor:
        return torch.stack([local(p) for p in self.parameters])

    def _gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients, 0 where they would stay in the optimizer's moments as NaN or inf for ever, and which would."""
        G = torch.stack([local_gradient(p) for p in self.parameters])
        sound = squarable(G)
        return select(sound, G, 0.0), count(sound.logical_not(), G)

    def _write(self, values: Tensor) -> None:
        _copy_each(self._own(), values)

    def _write_gradients(self, values: Tensor) -> None:
        _copy_each([local_gradient(p) for p in self.parameters], values)


def _copy_each(targets: list[Tensor], values: Tensor) -> None:  # L × (m, r), (L, m, r)
    torch._foreach_copy_(targets, list(values.unbind()))


def has_gradient(p: nn.Parameter) -> bool:
    """Whether this step moves it."""
    return p.requires_grad and p.grad is not None
