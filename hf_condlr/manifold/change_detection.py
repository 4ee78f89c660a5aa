"""What others do to factors and tolerances between the steps of an optimizer, noticed without a look at a value."""

from __future__ import annotations

from torch import nn

from hf_condlr.distributed.rows import version
from hf_condlr.layers import LowRankLayer


class Watch:
    """Compares the factors with what the manifold step knew of them: torch counts what is written into a tensor.

    Args:
        layers: The factored layers.
    """

    def __init__(self, layers: dict[str, LowRankLayer]) -> None:
        self.layers = layers
        self.remember()

    def remember(self) -> None:
        """The factors obey the constraint as they are."""
        self._versions, self._tolerances = self._count(), self._read_tolerances()

    def distrust(self) -> None:
        """Whatever they are, they are to be looked at."""
        self._versions = [-1] * len(self._versions)

    def is_written(self) -> bool:
        """Whether a factor was written, and no step has been since."""
        return self._versions != self._count()

    def is_retuned(self) -> bool:
        """Whether a tolerance or a center is another one."""
        return self._tolerances != self._read_tolerances()

    def is_written_beside(self, moving: list[nn.Parameter]) -> bool:
        """Whether a factor was written that is none of the `moving` ones."""
        known = {id(p) for p in moving}
        rows = zip(self._factors(), self._versions, self._count(), strict=True)
        return any(before != now and id(p) not in known for p, before, now in rows)

    def _count(self) -> list[int]:
        return [version(p) for p in self._factors()]

    def _factors(self) -> list[nn.Parameter]:
        return [p for layer in self.layers.values() for p in (layer.U, layer.S, layer.V)]

    def _read_tolerances(self) -> list[tuple[float, str]]:
        return [(layer.tau, layer.center) for layer in self.layers.values()]
