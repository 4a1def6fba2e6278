"""The runtime type checker behind jaxtyping's shapes."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

# As type checkers do: where a float is asked for, an int will do (PEP 484).
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
