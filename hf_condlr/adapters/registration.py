"""The adapter as a method of PEFT: a member of `PeftType`, and entries in PEFT's tables.

PEFT looks a method up in tables keyed by the members of an enumeration, which cannot be extended by its own means;
`register_peft_method` takes names of members only. So the member is made here. Nothing that exists is changed.
"""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from hf_condlr.adapters.config import PEFT_TYPE, CondLRAdapterConfig
from hf_condlr.adapters.tuner import PREFIX, CondLRAdapterModel


def register() -> None:
    """Make PEFT know the adapter; called again it does nothing."""
    if PEFT_TYPE not in PeftType.__members__:
        _add_member(PEFT_TYPE)
    if PeftType(PEFT_TYPE) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=PEFT_TYPE.lower(), config_cls=CondLRAdapterConfig, model_cls=CondLRAdapterModel, prefix=PREFIX
        )


def _add_member(name: str) -> None:
    """Add a member to `PeftType`, in all places where `Enum` keeps members."""
    kind: Any = PeftType
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
