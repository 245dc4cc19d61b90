"""Whether values that came out of a document are of the types that their class declares."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nearkin_service.errors import DataLossError

_INT64 = range(-(2**63), 2**63)
_LAST_SECOND = 253_402_300_800
"""Of the year 9999, which is as far as timestamps of the protocol go."""


def require_fit(value: Any, kind: Any, name: str) -> None:
    """DataLossError: `value`, or something in it, is not what `kind` says; a checksum cannot tell that."""
    if not _fits(value, kind):
        raise DataLossError(f"{name} is not {getattr(kind, '__name__', kind)}: {str(value)[:80]!r}")
    if is_dataclass(value):
        for field, declared in _declared(value.__class__).items():
            require_fit(getattr(value, field), declared, f"{name}.{field}")


@cache
def _declared(kind: type[Any]) -> Mapping[str, Any]:
    """The fields of a dataclass and their types; working these out takes longer than comparing them."""
    hints = get_type_hints(kind)
    return {each.name: hints[each.name] for each in fields(kind)}


def require_moment(seconds: Any, name: str) -> float:
    """Seconds since 1970. DataLossError: no such number."""
    require_fit(seconds, float, name)
    if not 0 <= seconds < _LAST_SECOND:
        raise DataLossError(f"{name} is not a time: {seconds!r}")
    return float(seconds)


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(each, arguments[0]) for each in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            _fits(key, arguments[0]) and _fits(each, arguments[1]) for key, each in value.items()
        )
    return _fits_plainly(value, kind)


def _fits_plainly(value: Any, kind: Any) -> bool:
    if kind is float:
        return _fits_plainly(value, int) or (type(value) is float and math.isfinite(value))
    if kind is int:
        return type(value) is int and value in _INT64
    if kind is str:
        return isinstance(value, str) and not any(map(_is_surrogate, value))
    return isinstance(value, kind)


def _is_surrogate(character: str) -> bool:
    """Half a character: JSON can hold it, UTF-8 cannot."""
    return "\ud800" <= character <= "\udfff"
