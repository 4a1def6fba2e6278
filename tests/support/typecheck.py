"""The runtime type checker behind jaxtyping's shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception

# As type checkers do: where a float is asked for, an int will do (PEP 484).
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's arguments and result on every call.

    A hint that names a protocol without `@runtime_checkable` cannot be checked at runtime; such a function is left as
    it is. Every other hint that beartype cannot read is an error.
    """
    try:
        return _check(function)
    except BeartypeDecorHintPep3119Exception:
        return function
