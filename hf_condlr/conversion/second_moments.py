"""The second moments that a config's start and rank allocation need, computed for as many layers as memory allows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_condlr.config import CondLRConfig
from hf_condlr.conversion.covariance import input_covariances
from hf_condlr.conversion.fisher import output_fisher
from hf_condlr.errors import ConfigError, require
from hf_condlr.layers import weight_matrix


class SecondMoments(NamedTuple):
    """What is known of a layer's inputs and of the gradients at its outputs; None where it was not measured."""

    C: Tensor | None = None  # E[x xᵀ] (n, n)
    F: Tensor | None = None  # E[Σ g gᵀ] (m, m)


class Calibration:
    """Second moments of a dense model's layers over calibration data.

    Args:
        model: The dense model.
        config: C is measured where it is aware of activations, F too where it says `fisher`.
        data: Batches, as `input_covariances` takes them; None where the config needs none.
        max_bytes: Memory for the matrices that are held at a time. Where all need more, layers take turns, and the data
            are gone over again for each turn.

    Raises:
        ConfigError: Data are missing or superfluous.
    """

    def __init__(
        self, model: nn.Module, config: CondLRConfig, data: Iterable[Any] | None, *, max_bytes: int = 4 * 2**30
    ) -> None:
        needed, given = config.needs_calibration_data, data is not None
        require(
            needed == given,
            "calibration_data is what 'activation_aware' and 'fisher' need, and nothing else",
            received=f"init_weights={config.init_weights!r}, rank_allocation={config.rank_allocation!r}, "
            f"{'with' if given else 'no'} calibration_data",
            remedy="Pass calibration_data=data_loader too." if needed else "Drop it, or choose one of them.",
            error=ConfigError,
        )
        self._model, self._max_bytes = model, max_bytes
        if data is not None and not hasattr(data, "__len__") and not hasattr(data, "dataset"):
            data = list(data)  # of a generator, since the data may be needed repeatedly
        self._data = data
        self._needs_fisher = "fisher" in (config.init_weights, config.rank_allocation)
        self._kept: dict[str, SecondMoments] = {}

    def second_moments(self, names: Iterable[str]) -> Iterator[tuple[str, SecondMoments]]:
        """Pairs of a layer's name and its second moments, in the order of the names.

        Raises:
            ConversionError: The data do not reach a layer, or the model has no logits to differentiate.
        """
        if self._data is None:
            yield from ((name, SecondMoments()) for name in names)
            return
        for turn in self._turns(names):
            if not set(turn) <= set(self._kept):
                self._kept = {}
                covariances = input_covariances(self._model, turn, self._data)
                fishers = output_fisher(self._model, turn, self._data) if self._needs_fisher else {}
                self._kept = {name: SecondMoments(covariances[name], fishers.get(name)) for name in turn}
            yield from ((name, self._kept[name]) for name in turn)

    def _turns(self, names: Iterable[str]) -> list[list[str]]:
        """The names in groups whose float32 matrices fit into memory together, one layer at least in each."""
        groups: list[list[str]] = []
        left = 0
        for name in names:
            m, n = weight_matrix(self._model.get_submodule(name)).shape
            need = 4 * (n**2 + (m**2 if self._needs_fisher else 0))
            if need > left or not groups:
                groups.append([])
                left = self._max_bytes
            groups[-1].append(name)
            left -= need
        return groups
