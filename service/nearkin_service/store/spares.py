"""Rows files that nobody needs any more, kept for the next push: their pages are in memory already.

Writing into a new file costs the kernel more than twice of what it costs into one whose pages are in memory.
A spare holds old rows: what a push does not overwrite has to be blanked before it is read.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from pathlib import Path

from nearkin.v1.room import LINE_BYTES

MOST = 2


class Spares:
    """The spares of one data directory. Any thread."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._sizes: dict[Path, int] = {}  # oldest first

    def keep(self, rows: Path) -> None:
        """Takes a rows file away from where it lies: becomes a spare if nobody has it open, else goes."""
        spare = self._directory / secrets.token_hex(8)
        try:
            rows.rename(spare)
        except FileNotFoundError:
            return
        if not _unused(spare):
            spare.unlink()
            return
        with self._lock:
            self._sizes[spare] = spare.stat().st_size
            over = list(self._sizes)[:-MOST]
            for path in over:
                self._remove(path)

    def take(self, size: int, goal: Path) -> bool:
        """Puts a spare of this size at `goal`, if there is one; it may have had some bytes more or less."""
        with self._lock:
            sizes = self._sizes.items()
            found = next((path for path, each in sizes if abs(each - size) < LINE_BYTES), None)
            if found is None:
                return False
            del self._sizes[found]
        found.rename(goal)
        os.truncate(goal, size)
        return True

    def clear(self) -> None:
        """Gives the disk space back."""
        with self._lock:
            for path in list(self._sizes):
                self._remove(path)

    def _remove(self, path: Path) -> None:
        del self._sizes[path]
        path.unlink(missing_ok=True)


def _unused(path: Path) -> bool:
    """Whether no other name, descriptor or mapping of the file is left: only then is a write lease given."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        return os.fstat(descriptor).st_nlink == 1
    except OSError:
        return False
    finally:
        os.close(descriptor)
