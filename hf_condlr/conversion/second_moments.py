"""Calibration data, and what is measured with them for as many layers at a time as memory allows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_condlr.conversion.grams import Gram, gram_bytes
from hf_condlr.conversion.measuring import measure
from hf_condlr.conversion.spectra import Spectrum
from hf_condlr.conversion.texts import as_batches
from hf_condlr.errors import ConversionError, require
from hf_condlr.layers import weight_matrix
from hf_condlr.linalg.precision import to_float64

LEAST_BYTES = 2**30


@dataclass
class Held:
    """What is held of a layer: sums over the data, and the spectra of its weight in their metric."""

    C: Gram
    F: Gram | None
    fingerprint: tuple[float, float]  # sum and norm of the weight
    spectra: dict[bool, Spectrum] = field(default_factory=dict)  # with F (True) or without


class Calibration:
    """Calibration data that remember what was measured with them: for several conversions of one dense model.

    Pass it as `calibration_data` for each copy of the model. Second moments and spectra are then computed once for all
    ratios, starts and bounds. They stay in memory with the object: for a layer (m, n), (n² + m²)/2 numbers and
    min(m, n)² for each of its metrics; n² only once for layers that read the same tensor.

    Args:
        data: As `calibration_data` of `get_robust_lowrank_model`.
        processing_class: Prepares texts and images, as in `get_robust_lowrank_model`.
        autocast: Precision of the passes, `torch.bfloat16` where the processor multiplies in it.
            Sums and decompositions stay in float32 and float64. None for the model's own.
        max_bytes: Memory for the second moments that are held at a time; None for the size of the model, at least
            1 GiB. If all need more, layers take turns, the model runs over the data again in each turn, and nothing is
            remembered.

    Examples:
        >>> calibration = Calibration(data_loader)
        >>> for ratio in (0.2, 0.4, 0.6):
        ...     config = CondLRConfig(compression_ratio=ratio, rank_allocation="fisher", init_weights="fisher")
        ...     get_robust_lowrank_model(copy.deepcopy(model), config, calibration_data=calibration)
    """

    def __init__(
        self,
        data: Iterable[Any],
        *,
        processing_class: Any = None,
        autocast: torch.dtype | None = None,
        max_bytes: int | None = None,
        remember: bool = True,
    ) -> None:
        self.data, self.autocast = as_batches(data, processing_class), autocast
        self.max_bytes, self.remember = max_bytes, remember
        self._kept: dict[str, Held] = {}

    def groups(self, model: nn.Module, names: Iterable[str], *, gradients: bool) -> list[list[str]]:
        """The names in groups whose second moments fit into memory together, one layer at least in each."""
        groups: list[list[str]] = []
        limit, left = self._limit(model), 0
        for name in names:
            need = _bytes(model, name, gradients)
            if need > left or not groups:
                groups.append([])
                left = limit
            groups[-1].append(name)
            left -= need
        return groups

    def held(self, model: nn.Module, group: Iterable[str], *, gradients: bool) -> dict[str, Held]:
        """What the data say of a group of layers: as remembered, or from a pass over them.

        Raises:
            ConversionError: The data do not reach a layer, the model has no logits to differentiate, or what is
                remembered belongs to other weights.
        """
        group = list(group)
        fingerprints = {name: _fingerprint(model, name) for name in group}
        self._require_same_weights(fingerprints)
        missing = [n for n in group if (kept := self._kept.get(n)) is None or (gradients and kept.F is None)]
        if missing:
            known = {*self._kept, *group}
            is_too_much = sum(_bytes(model, name, gradients) for name in known) > self._limit(model)
            if is_too_much or not self.remember:
                self._kept, missing = {}, group
            inputs, of_gradients = measure(model, missing, self.data, gradients=gradients, autocast=self.autocast)
            for name in missing:
                self._kept[name] = Held(inputs[name], of_gradients.get(name), fingerprints[name])
        return {name: self._kept[name] for name in group}

    def forget(self, name: str) -> None:
        """Free what was measured for a layer, unless it is to be remembered."""
        if not self.remember:
            self._kept.pop(name, None)

    def _limit(self, model: nn.Module) -> int:
        if self.max_bytes is not None:
            return self.max_bytes
        return max(LEAST_BYTES, sum(p.nbytes for p in model.parameters()))

    def _require_same_weights(self, fingerprints: Mapping[str, tuple[float, float]]) -> None:
        for name, (total, norm) in fingerprints.items():
            if (kept := self._kept.get(name)) is not None:
                then, norm_then = kept.fingerprint
                is_same = abs(total - then) <= 1e-6 * norm and abs(norm - norm_then) <= 1e-6 * norm
                rule = "a Calibration remembers second moments of one dense model"
                remedy = "Pass copies of that model, or make a Calibration for each."
                received = f"other weights in {name!r}"
                require(is_same, rule, received=received, remedy=remedy, error=ConversionError)


def _bytes(model: nn.Module, name: str, gradients: bool) -> int:
    m, n = weight_matrix(model.get_submodule(name)).shape
    return gram_bytes(n) + (gram_bytes(m) if gradients else 0)


def _fingerprint(model: nn.Module, name: str) -> tuple[float, float]:
    W = to_float64(weight_matrix(model.get_submodule(name)))
    return W.sum().item(), torch.linalg.vector_norm(W).item()
