"""Factors of equal shape, worked on together: their values around an optimizer's step, and which are usable.

Work is written for blocks (l, m, r) of matrices and runs over a list of them. On a CPU a block is one parameter itself,
(1, m, r), and is changed in place: copies cost more there than calls. On other devices one block holds a copy of all,
(L, m, r), so that launches are few. What is made of r×r matrices is joined to one tensor (L, r, r) everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hf_condlr.distributed.collectives import Task, Work
from hf_condlr.distributed.replicas import checksums
from hf_condlr.distributed.shards import layout, local, local_gradient, rows_of
from hf_condlr.linalg import per_matrix
from hf_condlr.manifold import masks
from hf_condlr.manifold.masks import as_number, finite, squares, surely_all, usable_squares

Blocks = list[Tensor]  # (l, m, r) each, L matrices in all


def join(parts: Iterable[Tensor]) -> Tensor:  # (l, *) each -> (L, *)
    """One result for all matrices from those of their blocks."""
    parts = list(parts)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def split(X: Tensor, blocks: Blocks) -> tuple[Tensor, ...]:  # (L, *) -> (l, *) each
    """The parts of a result that belong to each block."""
    return X.split([len(block) for block in blocks])


class Stack:
    """Parameters of equal shape, dtype, device and sharding, with their values before the optimizer's step.

    Of sharded parameters every tensor here holds this process's rows only.

    Attributes:
        rows: Which of the m rows this process holds.
        start: U₀, the values at the last projection, kept until the next one.
        old: Values before the optimizer's step.
        checksums: (L,) int64: checksums of the values after the last step, or None where they are not known.
        written: (L,) bool: the values before this step are not those after the last one.
        usable: (L,) bool: gradient and update are finite, on all processes, and no other code has written the factor.
            Other factors keep their old values.
        held_at: (L,) int64: the first step since the last `held` at which a factor was not usable; 0 if none.
    """

    start: Blocks
    old: Blocks
    usable: Tensor
    written: Tensor
    copied = False  # whether blocks are copies on a CPU, too

    def __init__(self, names: list[str], parameters: list[nn.Parameter]) -> None:
        self.names, self.parameters = names, parameters
        self.rows = rows_of(parameters[0])
        self.held_at = torch.zeros(len(parameters), dtype=torch.int64, device=parameters[0].device)
        self.checksums: Tensor | None = None

    def begin_interval(self) -> None:
        """Keep the values as `start`; called before the first step after a projection."""
        self.begin_step()
        self.start = self.old

    def begin_step(self) -> None:
        """Keep the values as `old`, before each step. Copies follow factors whose device or dtype was changed."""
        values = self._values()
        self.old = values if self._are_copies() else [X.clone() for X in values]
        if start := getattr(self, "start", None):
            self.start = [X.to(values[0]) for X in split(join(start), self.old)]
        self.held_at = self.held_at.to(values[0].device)
        self.look(values)
        self.usable = self.written.logical_not()

    def look(self, values: Blocks | None = None) -> None:
        """Find out which factors other code has `written`; none if no checksums are known."""
        found = checksums(self._values() if values is None else values)
        self.written = found != (found if self.checksums is None else self.checksums.to(found.device))

    def remember(self, values: Blocks | None = None) -> None:
        """Take the values, or the present ones, as those that the step left."""
        self.checksums = checksums(self._values() if values is None else values)

    def hold_update(self, step: int) -> Work[None]:
        """After a step that no projection follows: factors that are not usable go back to their old values."""
        new, unusable = self._update()
        (unusable,) = yield [unusable]
        self._accept(new, unusable)
        self.remember(new)
        self._record(step)

    def end_interval(self) -> None:
        """After the projection: drop the copies."""
        self.start = self.old = []

    def task(self, work: Work[None]) -> Task:
        """Work of this stack, to be run together with that of other stacks."""
        return Task(self.rows, work, len(self.parameters) * self.parameters[0].shape[-1] ** 2)

    def held(self) -> dict[str, int]:
        """{factor: first step at which it kept its old value}; clears the record. Waits for the device."""
        found = {name: step for name, step in zip(self.names, self.held_at.tolist(), strict=True) if step}
        self.held_at = torch.zeros_like(self.held_at)
        return found

    def _update(self) -> tuple[Blocks, Tensor]:
        """The values after the optimizer's step, and 1 for each factor that is not usable here."""
        new = self._values()
        return new, as_number(self.usable.logical_not() | join(map(finite, new)).logical_not(), new[0])

    def _accept(self, new: Blocks, unusable: Tensor) -> None:
        """Give factors that are not usable on some process their old values back."""
        self.usable = unusable == 0
        if not surely_all(self.usable):
            masks_of_blocks = split(per_matrix(self.usable), new)
            kept = [torch.where(*x) for x in zip(masks_of_blocks, new, self.old, strict=True)]
            torch._foreach_copy_(new, kept)
            self._write(new)
        self.old = self.start  # no separate copy is kept over forward and backward

    def _record(self, step: int) -> None:
        """Note which factors kept their values in this step, other than those that were written."""
        held = (self.usable | self.written).logical_not()
        self.held_at = torch.where(held & (self.held_at == 0), step, self.held_at)

    def _gradients(self) -> tuple[Blocks, Tensor]:
        """The gradients, and their ‖G‖_F². `usable` is false for those that are not finite or too large.

        These gradients become zero: NaN or inf would stay in the optimizer's state permanently.
        """
        G = self._blocks([local_gradient(p) for p in self.parameters])
        norms_squared = join(map(squares, G))
        self.usable = self.usable & usable_squares(norms_squared)
        self._zero_unusable(G)
        return G, norms_squared

    def _zero_unusable(self, G: Blocks) -> None:
        if not surely_all(self.usable):
            for X, mask in zip(G, split(per_matrix(self.usable), G), strict=True):
                X.masked_fill_(mask.logical_not(), 0.0)

    def _write_gradients(self, G: Blocks) -> None:
        if self._are_copies():
            torch._foreach_copy_([local_gradient(p) for p in self.parameters], list(join(G).unbind()))

    def _are_copies(self) -> bool:
        """Whether blocks are copies of parameters and gradients, to be written back."""
        p = self.parameters[0]
        return self.copied or p.device.type != "cpu" or masks.runs_ahead(p)

    def _blocks(self, tensors: list[Tensor]) -> Blocks:
        return [torch.stack(tensors)] if self._are_copies() else [X[None] for X in tensors]

    def _values(self) -> Blocks:
        return self._blocks([local(p) for p in self.parameters])

    def _write(self, values: Blocks) -> None:
        if self._are_copies():
            sharded = layout(self.parameters[0]) is not None
            targets: list[Tensor] = [local(p) for p in self.parameters] if sharded else [*self.parameters]
            torch._foreach_copy_(targets, list(join(values).unbind()))


def has_gradient(p: nn.Parameter) -> bool:
    """Whether the next step of the optimizer moves this parameter; freezing it after backward does not prevent that."""
    return p.grad is not None
