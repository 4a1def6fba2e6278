"""Strict settings: a mapping (YAML, JSON) becomes a frozen dataclass; an unknown key names its nearest neighbour."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from tokenizer.errors import UserError

T = TypeVar("T")


def from_mapping(cls: type[T], mapping: Mapping[str, Any], *, where: str = "config") -> T:
    """Build the dataclass `cls` from `mapping`, nested dataclasses included.

    Args:
        cls: A dataclass type; its `__post_init__` may raise `ValueError` for bad values.
        mapping: Keys are field names; values have the fields' types (an int is taken where a float is asked for).
        where: How to call this mapping in messages, such as `configs/f3.yaml: model`.

    Raises:
        UserError: for an unknown key, a missing key, a wrong type, or a value the dataclass refuses.
    """
    if not isinstance(mapping, Mapping):
        raise UserError(f"{where} is {mapping!r}, but must be a mapping of settings; see configs/ for examples")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            hint = f"did you mean '{near[0]}'?" if near else "it takes no settings"
            raise UserError(f"{where}: unknown key '{key}'; {hint}")
        values[key] = _convert(hints[key], value, f"{where}.{key}")
    missing = [
        name
        for name, f in fields.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UserError(f"{where}: missing key '{missing[0]}'; add it (see configs/ for examples)")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        failures = []
        for option in arguments:
            if option is type(None):
                continue
            try:
                return _convert(option, value, where)
            except UserError as error:
                failures.append(error)
        raise failures[0]
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise UserError(f"{where}={value!r} must be one of {', '.join(map(str, arguments))}")
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_mapping(hint, value, where=where)  # type: ignore[arg-type]
    if origin in (tuple, list):
        if not isinstance(value, (list, tuple)):
            raise UserError(f"{where}={value!r} must be a list")
        inner = arguments[0] if arguments else Any
        return origin(_convert(inner, item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}={value!r} must be a mapping")
        return {k: _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if hint is Any or hint is None:
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 3e-4 as text
        except ValueError:
            pass
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    name = getattr(hint, "__name__", str(hint))
    raise UserError(f"{where}={value!r} must be of type {name}")
