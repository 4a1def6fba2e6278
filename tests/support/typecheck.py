"""The runtime type checker behind jaxtyping's shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype
from beartype.roar import BeartypeDecorHintPep3119Exception


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's arguments and result on every call.

    A hint that names a protocol without `@runtime_checkable` cannot be checked at runtime; such a function is left as
    it is. Every other hint that beartype cannot read is an error.
    """
    try:
        return beartype(function)
    except BeartypeDecorHintPep3119Exception:
        return function
