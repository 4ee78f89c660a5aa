"""Changes that others make to factors and tolerances between the steps, detected without reading a value."""

from __future__ import annotations

from torch import nn

from hf_condlr.distributed.shards import version
from hf_condlr.layers import LowRankLayer


class ChangeDetector:
    """Compares torch's counts of how often each factor was written, and the tolerances, with those at `remember`.

    Args:
        layers: The factored layers.
    """

    def __init__(self, layers: dict[str, LowRankLayer]) -> None:
        self.layers = layers
        self.remember()

    def remember(self) -> None:
        """Take the present state as the one to compare with: the factors obey the constraint."""
        self._versions, self._tolerances = self._read_versions(), self._read_tolerances()

    def mark_changed(self) -> None:
        """Mark every factor as possibly changed."""
        self._versions = [-1] * len(self._versions)

    def factors_changed(self) -> bool:
        """Whether a factor was written since `remember`."""
        return self._versions != self._read_versions()

    def tolerances_changed(self) -> bool:
        """Whether a layer has another `tau` or `center` than at `remember`."""
        return self._tolerances != self._read_tolerances()

    def other_factors_changed(self, moving: list[nn.Parameter]) -> bool:
        """Whether a factor that is not among the `moving` ones was written since `remember`."""
        known = {id(p) for p in moving}
        rows = zip(self._factors(), self._versions, self._read_versions(), strict=True)
        return any(before != now and id(p) not in known for p, before, now in rows)

    def _read_versions(self) -> list[int]:
        return [version(p) for p in self._factors()]

    def _factors(self) -> list[nn.Parameter]:
        return [p for layer in self.layers.values() for p in (layer.U, layer.S, layer.V)]

    def _read_tolerances(self) -> list[tuple[float, str]]:
        return [(layer.tau, layer.center) for layer in self.layers.values()]
