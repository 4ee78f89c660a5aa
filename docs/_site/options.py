"""Griffe extension: the description in `name: type = option(default, "description")` is the field's documentation."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class Options(griffe.Extension):
    """Give fields of option dataclasses their help text as docstring, and their default as value."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Read the call of `option`."""
        value = attr.value
        if not isinstance(value, griffe.ExprCall) or str(value.function) != "option" or len(value.arguments) < 2:
            return
        default, description = value.arguments[:2]
        attr.value = default
        if attr.docstring is None:
            attr.docstring = griffe.Docstring(ast.literal_eval(str(description)), parent=attr)
