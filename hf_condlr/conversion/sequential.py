"""Sequential calibration: each layer is factored for the inputs that it gets from the part compressed before it.

The dense model's layer computes W x. Behind compressed layers it is given x̂ instead of x, so the factors Ŵ are chosen
to give W x for x̂, as AA-SVD (arXiv 2604.02119) does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_condlr.conversion.calibration import (
    CalibrationBatch,
    accepted,
    calibration_batch,
    calibration_batches,
    frozen,
    in_precision,
    run,
    skips_head,
)
from hf_condlr.conversion.grams import Gram
from hf_condlr.conversion.measuring import layer_rows, require_values
from hf_condlr.conversion.stages import Call, Chain, Stage, find_chains, hidden_of
from hf_condlr.errors import ConversionError
from hf_condlr.layers import replace_modules, weight_matrix
from hf_condlr.linalg.precision import at_least_float32, to_float64

RIDGE = 1e-2  # λ, as a share of the mean eigenvalue of Ĉ


def corrected_weight(W: Tensor, C: Tensor, E: Tensor, *, ridge: float = RIDGE) -> Tensor:
    """The A (m, n) that gives the dense layer's outputs for the inputs x̂ of the compressed model.

    A minimises E‖W x − A x̂‖² + λ‖W − A‖_F² over all matrices, λ = ridge · tr Ĉ/n:

        A = W + W E (Ĉ + λI)⁻¹,  Ĉ = E[x̂ x̂ᵀ],  E = E[(x − x̂) x̂ᵀ].

    E‖W x − Ŵ x̂‖² is ‖(A − Ŵ) Ĉ^{1/2}‖_F² and a constant for every Ŵ where λ = 0: the best Ŵ of rank r is the best
    approximation of A in the metric of Ĉ, and where the outputs' metric F̃ is known, in that of both. λ keeps A near W
    in directions in which few x̂ were seen; A = W where Ĉ = 0 or x̂ = x.

    Args:
        W: The dense weight (m, n).
        C: Ĉ (n, n).
        E: (n, n).
        ridge: λ as a share of the mean eigenvalue of Ĉ.
    """
    if not E.any():
        return at_least_float32(W)
    wide, C, E = to_float64(W), to_float64(C), to_float64(E)
    L = torch.linalg.cholesky(C + ridge * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype, device=C.device))
    return (wide + torch.cholesky_solve((wide @ E).mT, L).mT).to(at_least_float32(W))


class Inputs:
    """What the layers of a group read: Ĉ = E[x̂ x̂ᵀ] and E = E[(x − x̂) x̂ᵀ] over the calibration data."""

    def __init__(self, size: int) -> None:
        self._gram = Gram(size)
        self._difference: Tensor | None = None

    def add(self, x: Tensor, seen: Tensor) -> None:  # (N, n), (N, n)
        """Add rows of a batch, those of the dense model and those of the compressed one."""
        x, seen = at_least_float32(x), at_least_float32(seen)
        self._gram.add(seen)
        self._gram.count += len(seen)
        if self._difference is None:
            self._difference = x.new_zeros(x.shape[1], x.shape[1])
        self._difference.addmm_((x - seen).mT, seen)  # in place, as in Gram

    def means(self, names: Iterable[str]) -> tuple[Tensor, Tensor]:
        """Ĉ and E.

        Raises:
            ConversionError: There were no rows, or values that are not finite.
        """
        require_values(dict.fromkeys(names, self._gram), "the calibration data")
        assert self._difference is not None
        return self._gram.mean(), self._difference / self._gram.count


def sequential_inputs(
    model: nn.Module,
    names: Iterable[str],
    data: Iterable[Any],
    layers: Mapping[nn.Module, nn.Module],
    *,
    autocast: torch.dtype | None = None,
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Iterate over groups of layers that read the same tensor, in order of execution, each with its Ĉ and E.

    Two runs go side by side through the model: the dense one, and one in which the layers so far are replaced. Of both
    only the hidden states between stages (blocks) are kept; each group of layers runs its stage once more, batch by
    batch, up to where it reads. At every yield the model is as it was.

    Args:
        model: The dense model.
        names: The layers to factor.
        data: Batches; iterated over once.
        layers: {dense layer: factored layer}; before the next group is asked for, the caller adds those of this one.
        autocast: Precision of the runs; None for the model's own.

    Raises:
        ConversionError: A layer is not called exactly once in a forward pass, or what it reads is not finite.
    """
    runs = _Runs(model, list(names), data, layers, autocast)
    for chain in runs.chains:
        dense, seen = runs.begin(chain)
        for k, stage in enumerate(chain.stages):
            for group in stage.groups:
                yield group, *runs.inputs(group, stage, [calls[k] for calls in dense], [calls[k] for calls in seen])
            if k + 1 < len(chain.stages):
                runs.go_on(stage, k, dense, seen)


def runs_in_blocks(model: nn.Module, names: Sequence[str], data: Iterable[Any]) -> bool:
    """Whether `sequential_inputs` takes each layer, and runs most of them with their block alone.

    That is where each layer runs once in a forward pass, and more than half of them lie in blocks (stages of chains).

    Args:
        model: The dense model.
        names: The layers to factor.
        data: Batches, of which the first one is run.
    """
    with frozen(model):
        try:
            chains, _ = find_chains(model, names, calibration_batch(model, next(iter(data))))
        except ConversionError:
            return False
    in_blocks = [group for chain in chains if chain.slots for stage in chain.stages for group in stage.groups]
    return 2 * sum(map(len, in_blocks)) > len(names)


class _Runs:
    """The dense and the compressed run, over batches that are kept: both must see the same ones."""

    def __init__(
        self,
        model: nn.Module,
        names: list[str],
        data: Iterable[Any],
        layers: Mapping[nn.Module, nn.Module],
        autocast: torch.dtype | None,
    ) -> None:
        self.model, self.layers, self.autocast = model, layers, autocast
        without_head = skips_head(model, map(model.get_submodule, names)) | accepted(model, use_cache=False)
        self.batches = list(calibration_batches(model, data))
        for batch in self.batches:
            batch.kwargs |= without_head if batch.kwargs else {}
        with self._ready():
            self.chains, self.reads_decoder = find_chains(model, names, self.batches[0])

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """The model in evaluation mode and frozen, its products in the precision that was asked for."""
        with frozen(self.model), in_precision(self.model, self.autocast):
            yield

    @torch.no_grad()
    def begin(self, chain: Chain) -> tuple[list[list[Call]], list[list[Call]]]:
        """The calls [batch][stage] of a chain in both runs; the hidden states of later stages are yet to come."""
        if not chain.slots:
            calls = [[Call(batch.args, batch.kwargs)] for batch in self.batches]
            return calls, [list(of_batch) for of_batch in calls]
        with self._ready():
            dense = [_calls(self.model, chain, batch) for batch in self.batches]
            if not self.layers:
                return dense, [list(of_batch) for of_batch in dense]
            with replaced(self.model, self.layers):
                return dense, [_calls(self.model, chain, batch) for batch in self.batches]

    @torch.no_grad()
    def go_on(self, stage: Stage, k: int, dense: list[list[Call]], seen: list[list[Call]]) -> None:
        """Set the calls of the next stage in both runs."""
        with self._ready():
            for of_batch in dense:
                _go_on(stage.module, k, of_batch)
            with replaced(stage.module, self.layers):
                for of_batch in seen:
                    _go_on(self.layers.get(stage.module, stage.module), k, of_batch)

    @torch.no_grad()
    def inputs(self, group: list[str], stage: Stage, dense: list[Call], seen: list[Call]) -> tuple[Tensor, Tensor]:
        """Ĉ and E of the layers of a group."""
        layer = self.model.get_submodule(group[0])
        sums = Inputs(weight_matrix(layer).shape[1])
        with self._ready():
            for batch, call, compressed_call in zip(self.batches, dense, seen, strict=True):
                mask = batch.decoder_mask if group[0] in self.reads_decoder else batch.mask
                x = _read_by(layer, stage.module, call)
                with replaced(stage.module, self.layers):
                    x_hat = _read_by(layer, stage.module, compressed_call)
                sums.add(layer_rows(layer, x, mask), layer_rows(layer, x_hat, mask))
        return sums.means(group)


class _Reached(BaseException):  # no model's `except Exception` catches it
    """A run need not go on."""


def _read_by(layer: nn.Module, module: nn.Module, call: Call) -> Tensor:
    """What a layer reads in a call of the module that it lies in."""
    read: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
        read.append(args[0])
        raise _Reached

    hook = layer.register_forward_pre_hook(stop)
    try:
        module(*call.args, **call.kwargs)
    except _Reached:
        pass
    finally:
        hook.remove()
    return read[0]


def _calls(model: nn.Module, chain: Chain, batch: CalibrationBatch) -> list[Call]:
    """The calls of a chain's stages; all but the first without their hidden states."""
    calls: list[Call] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = Call(args, kwargs, chain.slots[len(calls)])
        calls.append(call.given(None) if calls else call)
        if len(calls) == len(chain.stages):
            raise _Reached

    hooks = [stage.module.register_forward_pre_hook(keep, with_kwargs=True) for stage in chain.stages]
    try:
        run(model, batch)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _go_on(module: nn.Module, k: int, calls: list[Call]) -> None:
    """Run stage k of a batch; what it puts out is what the next one reads, and what it read is freed."""
    output = hidden_of(module(*calls[k].args, **calls[k].kwargs))
    calls[k], calls[k + 1] = calls[k].given(None), calls[k + 1].given(output)


@contextmanager
def replaced(module: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """The factored layers in place of the dense ones; afterwards the module is as it was."""
    replace_modules(module, layers)
    try:
        yield
    finally:
        replace_modules(module, {factored: dense for dense, factored in layers.items()})
