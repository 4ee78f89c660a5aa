"""Factors of equal shape as one stack (L, m, r): their values around an optimizer's step, and which are usable."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_condlr.distributed.collectives import Task, Work
from hf_condlr.distributed.replicas import checksums
from hf_condlr.distributed.shards import layout, local, local_gradient, rows_of
from hf_condlr.linalg import per_matrix
from hf_condlr.manifold.masks import as_number, finite, select, squarable, surely_all


class Stack:
    """Parameters of equal shape, dtype, device and sharding, with their values before the optimizer's step.

    Of sharded parameters every tensor here holds this process's rows only.

    Attributes:
        rows: Which of the m rows this process holds.
        start: U₀, the values at the last projection, (L, m, r), kept until the next one.
        old: Values before the optimizer's step, (L, m, r).
        checksums: (L,) int64: checksums of the values after the last step, or None where they are not known.
        written: (L,) bool: the values before this step are not those after the last one.
        usable: (L,) bool: gradient and update are finite, on all processes, and no other code has written the factor.
            Other factors keep their old values.
        held_at: (L,) int64: the first step since the last `held` at which a factor was not usable; 0 if none.
    """

    start: Tensor
    old: Tensor
    usable: Tensor
    written: Tensor

    def __init__(self, names: list[str], parameters: list[nn.Parameter]) -> None:
        self.names, self.parameters = names, parameters
        self.rows = rows_of(parameters[0])
        self.held_at = torch.zeros(len(parameters), dtype=torch.int64, device=parameters[0].device)
        self.checksums: Tensor | None = None

    def begin_interval(self) -> None:
        """Keep the values as `start`; called before the first step after a projection."""
        self.start = self._values()
        self.begin_step(self.start)

    def begin_step(self, values: Tensor | None = None) -> None:
        """Keep the values as `old`, before each step. Copies follow factors whose device or dtype was changed."""
        self.old = self._values() if values is None else values
        self.start, self.held_at = self.start.to(self.old), self.held_at.to(self.old.device)
        self.look(self.old)
        self.usable = self.written.logical_not()

    def look(self, values: Tensor | None = None) -> None:
        """Find out which factors other code has `written`; none if no checksums are known."""
        found = checksums(self._values() if values is None else values)
        self.written = found != (found if self.checksums is None else self.checksums.to(found.device))

    def remember(self, values: Tensor | None = None) -> None:
        """Take the values, or the present ones, as those that the step left."""
        self.checksums = checksums(self._values() if values is None else values)

    def hold_update(self, step: int) -> Work[None]:
        """After a step that no projection follows: factors that are not usable go back to their old values."""
        new, unusable = self._update()
        (unusable,) = yield [unusable]
        self.remember(self._accept(new, unusable))
        self._record(step)

    def end_interval(self) -> None:
        """After the projection of all stacks: drop the copies."""
        self.start = self.old = self.held_at.new_zeros(0)

    def task(self, work: Work[None]) -> Task:
        """Work of this stack, to be run together with that of other stacks."""
        return Task(self.rows, work, len(self.parameters) * self.parameters[0].shape[-1] ** 2)

    def held(self) -> dict[str, int]:
        """{factor: first step at which it kept its old value}; clears the record. Waits for the device."""
        found = {name: step for name, step in zip(self.names, self.held_at.tolist(), strict=True) if step}
        self.held_at = torch.zeros_like(self.held_at)
        return found

    def _update(self) -> tuple[Tensor, Tensor]:
        """The values after the optimizer's step, in a new tensor, and 1 for each factor that is not usable here."""
        new = self._values()
        return new, as_number(self.usable.logical_not() | finite(new).logical_not(), new)

    def _accept(self, new: Tensor, unusable: Tensor) -> Tensor:
        """The values after the step; factors that are not usable on some process get their old values back."""
        self.usable = unusable == 0
        if not surely_all(self.usable):
            new = torch.where(per_matrix(self.usable), new, self.old)
            self._write(new)
        self.old = self.start  # no separate copy is kept over forward and backward
        return new

    def _record(self, step: int) -> None:
        """Note which factors kept their values in this step, other than those that were written."""
        held = (self.usable | self.written).logical_not()
        self.held_at = torch.where(held & (self.held_at == 0), step, self.held_at)

    def _gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients, and 1 for each that is not finite or too large, or whose factor other code wrote.

        These gradients become zero: NaN or inf would stay in the optimizer's state permanently.
        """
        G = torch.stack([local_gradient(p) for p in self.parameters])
        sound = squarable(G) & self.usable
        return select(sound, G, 0.0), as_number(sound.logical_not(), G)

    def _write_gradients(self, values: Tensor) -> None:
        torch._foreach_copy_([local_gradient(p) for p in self.parameters], list(values.unbind()))

    def _values(self) -> Tensor:
        return torch.stack([local(p) for p in self.parameters])

    def _write(self, values: Tensor) -> None:
        sharded = layout(self.parameters[0]) is not None
        targets: list[Tensor] = [local(p) for p in self.parameters] if sharded else [*self.parameters]
        torch._foreach_copy_(targets, list(values.unbind()))


def has_gradient(p: nn.Parameter) -> bool:
    """Whether the next step of the optimizer moves this parameter; freezing it after backward does not prevent that."""
    return p.grad is not None
