"""JSON from elsewhere as dataclasses, with every value checked against the type of its field."""

import sys
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints


def made(cls: Any, values: Mapping[str, Any], what: str) -> Any:
    """Returns a dataclass made from JSON, each value checked against its field's type; unknown fields are left out."""
    hints = get_type_hints(cls)
    for item in fields(cls):
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{what} has no `{item.name}`, expected {hints[item.name]}.")
    known = {item.name for item in fields(cls)} & set(values)
    return cls(**{name: _value(hints[name], values[name], f"{what}: `{name}`") for name in known})


def _value(hint: Any, value: Any, what: str) -> Any:
    for option in get_args(hint) if isinstance(hint, types.UnionType) else (hint,):
        kind, inner = get_origin(option) or option, get_args(option)
        if is_dataclass(kind) and isinstance(value, dict):
            return made(kind, value, what)
        if kind is tuple and isinstance(value, list):
            return tuple(_value(inner[0], item, what) for item in value)
        if kind is dict and isinstance(value, dict):
            return {name: _value(inner[1], item, what) for name, item in value.items()}
        if kind is Any or type(value) is kind:
            return value
        if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
            return value
    raise ValueError(f"{what} is {str(value)[:80]!r}, expected {hint}.")
