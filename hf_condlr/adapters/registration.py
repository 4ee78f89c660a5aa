"""The adapter as a method of PEFT: a member of `PeftType`, and entries in PEFT's tables.

PEFT looks a method up in tables keyed by the members of an enumeration, which cannot be extended by its own means;
`register_peft_method` takes names of members only, and classes. So the member is made here, and until an adapter is
made or loaded, names stand for the classes, whose import needs PEFT itself. Nothing that exists is changed.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from hf_condlr.after_import import after_import

PEFT_TYPE = "CONDLR_ADAPTER"
PREFIX = "condlr_"


def register_adapter() -> None:
    """Make PEFT know the adapter, now or when it is imported; called again it does nothing."""
    after_import("peft", _add_method)


def _add_method(peft: ModuleType) -> None:
    kind = peft.PeftType
    if PEFT_TYPE not in kind.__members__:
        _add_member(kind, PEFT_TYPE)
    tables: Any = import_module("peft.mapping")
    member = kind(PEFT_TYPE)
    tables.PEFT_TYPE_TO_PREFIX_MAPPING.setdefault(member, PREFIX)
    config, tuner = _Named("config", "CondLRAdapterConfig"), _Named("tuner", "CondLRAdapterModel")
    tables.PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(member, config)
    tables.PEFT_TYPE_TO_TUNER_MAPPING.setdefault(member, tuner)


class _Named:
    """Stands for a class of this package until something is asked of it."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._class = module, name

    def _load(self) -> Any:
        return getattr(import_module(f"hf_condlr.adapters.{self._module}"), self._class)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._load()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)


def _add_member(kind: Any, name: str) -> None:
    """Add a member to an `Enum` of strings, in all places where it keeps members."""
    member: Any = str.__new__(kind, name)
    member._name_ = member._value_ = name
    member.__objclass__ = kind
    member._sort_order_ = len(kind)
    kind._member_names_.append(name)
    kind._member_map_[name] = member
    kind._value2member_map_[name] = member
    if hasattr(kind, "_hashable_values_"):  # Python 3.13
        kind._hashable_values_.append(name)
    type.__setattr__(kind, name, member)  # Enum itself refuses new attributes
