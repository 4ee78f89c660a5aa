"""The parts of a model that run one after the other, found by what happens in a forward pass and not by names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from hf_condlr.conversion.calibration import CalibrationBatch, run
from hf_condlr.errors import ConversionError, listed, require


@dataclass
class Call:
    """Arguments of one call of a module; `slot` says where among them the output of the stage before it is."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str = 0

    @property
    def hidden(self) -> Any:
        """What the stage before it put out."""
        return self.kwargs[self.slot] if isinstance(self.slot, str) else self.args[self.slot]

    def given(self, hidden: Any) -> Call:
        """The call with another hidden state."""
        if isinstance(self.slot, str):
            return replace(self, kwargs=self.kwargs | {self.slot: hidden})
        return replace(self, args=(*self.args[: self.slot], hidden, *self.args[self.slot + 1 :]))


@dataclass
class Stage:
    """A module, and the layers in it in groups that read the same tensor, in order of execution."""

    module: nn.Module
    groups: list[list[str]] = field(default_factory=list)


@dataclass
class Chain:
    """Stages of which each reads what the one before it puts out, as the blocks of a transformer do.

    Layers that lie in no such list are those of one stage, which is the whole model.
    """

    stages: list[Stage]
    slots: list[int | str] = field(default_factory=list)  # of the stages; empty for the whole model


def find_chains(model: nn.Module, names: Iterable[str], batch: CalibrationBatch) -> tuple[list[Chain], set[str]]:
    """Find out in one forward pass what runs in which order.

    Returns:
        The chains in order of execution, and the names of the layers whose rows are tokens of the decoder.

    Raises:
        ConversionError: A layer is called several times in a pass, or never.
    """
    names = list(names)
    trace = _traced(model, names, batch)
    count = Counter(trace.order)
    odd = [name for name in names if count[name] != 1]
    require(
        not odd,
        "a layer must be called once in a forward pass to be factored for the inputs that the layers before it leave",
        received=f"{listed(odd)} called {', '.join(sorted({str(count[name]) for name in odd}))} times",
        remedy="Set sequential_calibration=False, or put it in exclude_modules.",
        error=ConversionError,
    )
    lists = _chains_of_lists(model, trace)
    place = _places(model, lists, trace.order)
    # A chain that other layers run in between is none.
    runs = Counter(key for key, _ in groupby(trace.order, key=lambda name: place.get(name, (-1, -1))[0]))
    place = {name: where for name, where in place.items() if runs[where[0]] == 1}
    found: list[Chain] = []
    for key, run_of_names in groupby(trace.order, key=lambda name: place.get(name, (-1, -1))[0]):
        chain = Chain([Stage(model)]) if key < 0 else lists[key]
        previous = None
        for name in run_of_names:
            stage = chain.stages[0 if key < 0 else place[name][1]]
            if stage.groups and previous is not None and trace.reads_same(previous, name):
                stage.groups[-1].append(name)
            else:
                stage.groups.append([name])
            previous = name
        found.append(chain)
    return found, trace.reads_decoder


@dataclass
class _Trace:
    order: list[str] = field(default_factory=list)  # the layers, as they were called
    inputs: dict[str, Tensor] = field(default_factory=dict)  # kept, so that no memory is used twice
    versions: dict[str, int] = field(default_factory=dict)
    reads_decoder: set[str] = field(default_factory=set)
    calls: dict[nn.Module, list[tuple[Call, Any]]] = field(default_factory=dict)  # of members of lists, with outputs

    def reads_same(self, first: str, second: str) -> bool:
        """Whether two layers that follow each other read the same values. Patches are not compared."""
        x, y = self.inputs[first], self.inputs[second]
        is_same = x.data_ptr() == y.data_ptr() and self.versions[first] == self.versions[second] and x.dim() != 4
        return is_same and (x.shape, x.stride(), x.dtype, x.device) == (y.shape, y.stride(), y.dtype, y.device)


@torch.no_grad()
def _traced(model: Any, names: list[str], batch: CalibrationBatch) -> _Trace:
    trace = _Trace()
    is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    decoder = set(model.get_decoder().modules()) if is_pair else set()
    encoded: list[int] = []

    def read(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        trace.order.append(name)
        trace.inputs[name], trace.versions[name] = args[0], args[0]._version
        if module in decoder and args[0].data_ptr() not in encoded:
            trace.reads_decoder.add(name)

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        trace.calls.setdefault(module, []).append((Call(args, kwargs), output))

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(read, name)) for name in names]
    for members in _lists(model):
        hooks += [member.register_forward_hook(called, with_kwargs=True) for member in members]
    if is_pair:
        end = model.get_encoder().register_forward_hook(lambda _, args, output: encoded.append(output[0].data_ptr()))
        hooks.append(end)
    try:
        run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return trace


def _lists(model: nn.Module) -> list[list[nn.Module]]:
    """Members of the lists of modules in the model, outer lists first."""
    lists = [list(module) for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    return [members for members in lists if len(members) > 1]


def _chains_of_lists(model: nn.Module, trace: _Trace) -> list[Chain]:
    found: list[Chain] = []
    inside: set[nn.Module] = set()
    for members in _lists(model):
        slots = _slots([trace.calls.get(member, []) for member in members])
        if slots is not None and members[0] not in inside and _can_be_repeated(members, trace):
            found.append(Chain([Stage(member) for member in members], slots))
            inside.update(module for member in members for module in member.modules())
    return found


@torch.no_grad()
def _can_be_repeated(members: list[nn.Module], trace: _Trace) -> bool:
    """Whether each member puts out the same when it is called again: it keeps no state and left its input alone."""
    for member in members:
        call, output = trace.calls[member][0]
        again, before = hidden_of(member(*call.args, **call.kwargs)), hidden_of(output)
        if again.shape != before.shape or not (again - before).norm() <= 1e-3 * before.norm():
            return False
    return True


def _slots(calls: list[list[tuple[Call, Any]]]) -> list[int | str] | None:
    """Where each member of a list reads the output of the one before it; None if the members are no chain."""
    if any(len(of_member) != 1 for of_member in calls):
        return None
    slots: list[int | str] = []
    outputs: list[Tensor] = []
    for ((call, output),) in calls:
        places: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
        if outputs:
            read = [(place, i) for place, value in places for i, earlier in enumerate(outputs) if value is earlier]
            if len(read) != 1 or read[0][1] != len(outputs) - 1:  # others skip stages
                return None
            slots.append(read[0][0])
        output = hidden_of(output)
        if not isinstance(output, Tensor):
            return None
        outputs.append(output)
    first = calls[0][0][0]
    is_there = slots[0] in first.kwargs if isinstance(slots[0], str) else slots[0] < len(first.args)
    return [slots[0], *slots] if is_there else None


def hidden_of(output: Any) -> Any:
    """The hidden state in what a stage puts out: the output itself, or the first of several."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _places(model: nn.Module, lists: list[Chain], order: list[str]) -> dict[str, tuple[int, int]]:
    """{name: (chain, stage)} of the layers that lie in a chain."""
    owner = {
        module: (i, j)
        for i, chain in enumerate(lists)
        for j, stage in enumerate(chain.stages)
        for module in stage.module.modules()
    }
    found = {name: owner.get(model.get_submodule(name)) for name in order}
    return {name: where for name, where in found.items() if where is not None}
