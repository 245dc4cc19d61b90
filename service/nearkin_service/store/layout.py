"""Where things lie in a data directory, and who may have it. docs/FORMAT.md draws it.

Paths are made from checked names only: runs match their pattern, push ids are the service's own.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from nearkin_service import faults
from nearkin_service.errors import DataLossError
from nearkin_service.store.atomic import fsync_directory, read_document, write_document
from nearkin_service.values import check_run_name

FORMAT_VERSION = 1
ABOUT = "nearkin.json"
_PUSH_ID = re.compile(r"[0-9a-f]{24}")


def new_push_id() -> str:
    return secrets.token_hex(12)


@dataclass(frozen=True, slots=True)
class Layout:
    """The paths of one data directory."""

    root: Path

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def trash(self) -> Path:
        return self.root / "trash"

    @property
    def spares(self) -> Path:
        return self.root / "spares"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    def run(self, run: str) -> Path:
        return self.runs / check_run_name(run)

    def pushes(self, run: str) -> Path:
        return self.run(run) / "pushes"

    def push(self, run: str, push_id: str) -> Path:
        assert _PUSH_ID.fullmatch(push_id)
        return self.pushes(run) / push_id

    def generations(self, run: str) -> Path:
        return self.run(run) / "generations"

    def generation(self, run: str, number: int) -> Path:
        return self.generations(run) / str(number)

    def discard(self, path: Path) -> None:
        """Takes a directory away at once: out of sight by one rename, then removed. None there: nothing."""
        goal = self.trash / secrets.token_hex(8)
        try:
            path.rename(goal)
        except FileNotFoundError:
            return
        faults.point("discard.renamed")
        with suppress(FileNotFoundError):  # what it lay in has gone as well
            fsync_directory(path.parent)
        shutil.rmtree(goal, ignore_errors=True)

    def set_aside(self, path: Path, name: str) -> Path:
        """Moves something damaged to the quarantine, for a person to look at."""
        goal = self.quarantine / f"{name}-{secrets.token_hex(4)}"
        path.rename(goal)
        fsync_directory(path.parent)
        return goal

    def prepare(self) -> None:
        """Makes the directories, checks the format, clears away leftovers. ValueError: a newer format."""
        for path in (self.root, self.runs, self.trash, self.quarantine, self.spares):
            path.mkdir(parents=True, exist_ok=True)
        self._check_format()
        faults.point("start.prepared")
        for place in (self.trash, self.spares):
            for left in place.iterdir():
                _remove(left)

    def _check_format(self) -> None:
        path = self.root / ABOUT
        if not path.exists():
            write_document(path, {"format": FORMAT_VERSION})
        try:
            found = read_document(path).get("format")
        except DataLossError as error:
            raise ValueError(
                f"{self.root} cannot be served: {error}; copy {ABOUT} from another of its format"
            ) from error
        if found != FORMAT_VERSION:
            raise ValueError(
                f"{self.root} has format {found}; this service reads format {FORMAT_VERSION}: "
                "use the service version that wrote it, or another --data-dir"
            )


def _remove(path: Path) -> None:
    """Whatever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


class DirectoryLock:
    """Held while a service has the data directory. ValueError: another one has it."""

    def __init__(self, root: Path, *, to_write: bool = True) -> None:
        """Makes the directory; who does not want `to_write` changes nothing, and may be unable to."""
        place, flags = root / "LOCK", os.O_RDWR | os.O_CREAT
        if to_write:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)  # embeddings are not for everyone here
        else:
            place, flags = place if place.exists() else root, os.O_RDONLY
        self._descriptor = os.open(place, flags | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise ValueError(f"--data-dir {root} is in use by another nearkin-serve") from None

    def release(self) -> None:
        os.close(self._descriptor)


def boot_id() -> str:
    """Names this boot of the machine: what was written but not flushed is there while it stays the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return secrets.token_hex(16)
