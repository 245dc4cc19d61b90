"""Standard output as a command needs it: what it cannot take ends the command in one line."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path
from typing import NoReturn, TextIO

from nearkin_client.errors import NearkinError

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def prepare() -> None:
    """Put ours in the place of Python's standard output."""
    if sys.stdout is None:  # whoever closed it wants nothing of it
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _Output(sys.stdout)


def one_line(text: str) -> str:
    """Without the control characters that would break a line, or tell a terminal what to do."""
    return _CONTROL.sub(" ", text)


class _Output(io.TextIOWrapper):
    """What its encoding lacks is written as an escape. A reader who goes away has seen enough: exit status 0.

    NearkinError: anything else keeps it from being written to.
    """

    def __init__(self, before: TextIO) -> None:
        encoding, lines = before.encoding, before.isatty()
        super().__init__(before.detach(), encoding, "backslashreplace", line_buffering=lines)  # type: ignore[attr-defined]

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> NoReturn:
        """What is left in buffers goes nowhere, or Python would try once more when it ends."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if isinstance(error, BrokenPipeError):
            sys.exit(0)
        raise NearkinError(f"cannot write to standard output: {error.strerror}") from error
