"""Limits from a file and from options: `--limits FILE` (TOML) and `--limit NAME=VALUE`; the option wins."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from nearkin_service.config import GIB, KIB, MIB, TIB, Limits

_UNITS: Mapping[str, int] = {"": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB}
_NUMBER = re.compile(r"([0-9]+(?:_[0-9]+)*) ?(KiB|MiB|GiB|TiB|)")
_NAMES = tuple(each.name for each in fields(Limits))


def limits(file: Path | None, options: Iterable[str]) -> Limits:
    """The service's limits. ValueError: an unknown name, or no number."""
    chosen = _from_file(file) if file else {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--limit {option!r} is not NAME=VALUE")
        chosen[_known(name.strip())] = _number(name, value.strip())
    return Limits(**chosen)


def _from_file(file: Path) -> dict[str, int]:
    try:
        document: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--limits {file}: {error}") from error
    return {_known(name): _number(name, str(value)) for name, value in document.items()}


def _known(name: str) -> str:
    if name not in _NAMES:
        raise ValueError(f"there is no limit {name[:80]!r}; there are {', '.join(_NAMES)}")
    return name


def _number(name: str, text: str) -> int:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{name} = {text[:80]!r} is not a whole number, with or without KiB, MiB, GiB or TiB"
        )
    return int(match[1]) * _UNITS[match[2]]
