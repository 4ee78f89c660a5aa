"""What the ranks and the start of a conversion read: second moments of each layer, and its spectrum in their metric."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from hf_condlr.config import CondLRConfig
from hf_condlr.conversion.factorizations import spectral_energy
from hf_condlr.conversion.second_moments import Calibration, Held
from hf_condlr.conversion.sequential import corrected_weight, sequential_inputs
from hf_condlr.conversion.spectra import Spectrum, decompose


@dataclass
class Measured:
    """Second moments of a layer's inputs and of the gradients at its outputs; None if not measured."""

    C: Tensor | None = None  # E[x xᵀ] (n, n)
    F: Tensor | None = None  # E[Σ g gᵀ] (m, m)
    held: Held | None = None  # where spectra are kept
    target: Tensor | None = None  # (m, n): what the factors approximate, if not the weight

    def spectrum(self, W: Tensor, F: Tensor | None, *, vectors: bool = True) -> Spectrum:
        """The weight (m, n) decomposed in the metric of C and, unless None, of F: once if it is kept."""
        spectra = {} if self.held is None else self.held.spectra
        found = spectra.get(F is not None)
        if found is None or (vectors and found.X is None):
            assert self.C is not None
            found = spectra[F is not None] = decompose(W, self.C, F, vectors=vectors)
        return found


class Statistics:
    """Second moments and spectra of the layers of one conversion.

    What fits into memory is measured and decomposed once, for ranks and start, and freed layer by layer as the factors
    are made. Else groups of layers take turns, once for the ranks and once more for the start.

    Args:
        model: The dense model.
        matrices: {name: W (m, n)} of the layers to convert.
        config: C is measured for `activation_aware` and `fisher`, F for `fisher` only.
        calibration: The data; None if the config needs none.
    """

    def __init__(
        self, model: nn.Module, matrices: Mapping[str, Tensor], config: CondLRConfig, calibration: Calibration | None
    ) -> None:
        self._model, self._matrices, self._calibration = model, matrices, calibration
        self._start, self._in_sequence = config.init_weights, config.sequential_calibration
        self._needs_gradients = "fisher" in (config.init_weights, config.rank_allocation)

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """The names in groups whose second moments fit into memory together; one group without data."""
        if self._calibration is None:
            return [list(names)]
        return self._calibration.groups(self._model, names, gradients=self._needs_gradients)

    def of(self, group: Collection[str], *, forget: bool = True) -> Iterator[tuple[str, Measured]]:
        """Pairs of a layer's name and its second moments, measured in one pass; freed when the next one is asked for.

        Raises:
            ConversionError: The data do not reach a layer, or the model has no logits to differentiate.
        """
        if self._calibration is None:
            yield from ((name, Measured()) for name in group)
            return
        held = self._calibration.held(self._model, group, gradients=self._needs_gradients)
        for name in group:
            layer = held.pop(name) if forget else held[name]
            F = layer.F.mean() if self._needs_gradients and layer.F is not None else None
            yield name, Measured(layer.C.mean(), F, layer)
            if forget:
                self._calibration.forget(name)

    def in_turns(self, names: Iterable[str]) -> Iterator[tuple[str, Measured]]:
        """`of` all the groups of the names."""
        for group in self.groups(names):
            yield from self.of(group)

    def in_sequence(
        self, names: Iterable[str], layers: Mapping[nn.Module, nn.Module]
    ) -> Iterator[tuple[str, Measured]]:
        """Pairs of a layer's name and its second moments behind compressed layers, in order of execution.

        Args:
            names: The layers to factor.
            layers: {dense layer: factored layer}; the caller adds a layer before the next one is asked for.

        Raises:
            ConversionError: As `of`, or a layer is not called exactly once in a forward pass.
        """
        assert self._calibration is not None
        names = list(names)
        turns = self.groups(names)
        held: dict[str, Held] = {}
        data, autocast = self._calibration.data, self._calibration.autocast
        for group, C, E in sequential_inputs(self._model, names, data, layers, autocast=autocast):
            for name in group:
                if self._start == "fisher" and name not in held:
                    turn = next(turn for turn in turns if name in turn)
                    held = self._calibration.held(self._model, turn, gradients=True)
                F = None if (layer := held.pop(name, None)) is None or layer.F is None else layer.F.mean()
                self._calibration.forget(name)
                yield name, Measured(C, F, target=corrected_weight(self._matrices[name], C, E))

    def energies(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Pairs of a name and σ_i² (min(m, n),) of F̃^{1/2} W C^{1/2}, without the factor that was not measured."""
        if self._calibration is None:
            yield from ((name, spectral_energy(self._matrices[name])) for name in names)
            return
        wanted = set(names)
        groups = self.groups(self._matrices)  # the layers that the start needs, too: measured once if they fit
        start_has_it = self._start == ("fisher" if self._needs_gradients else "activation_aware")
        start_has_it = start_has_it and not self._in_sequence  # there the start is in another metric
        for group in groups:
            for name, measured in self.of(group, forget=False):
                if name in wanted:
                    if len(groups) > 1:
                        measured.held = None  # it will be measured again
                    vectors = start_has_it and len(groups) == 1
                    yield name, measured.spectrum(self._matrices[name], measured.F, vectors=vectors).energy
