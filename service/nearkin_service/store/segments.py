"""Memory that a caller on this host and the service share for the time of a push: a small file.

The caller maps it and fills places in it; the service copies a place out before it looks at the bytes, so
that nothing the caller does afterwards can change what was checked and kept. The service reads and never
maps: a caller who cuts the file short harms itself only.
"""

from __future__ import annotations

import os
import secrets
import threading
from pathlib import Path

from nearkin_service.errors import InvalidArgumentError
from nearkin_service.store.rows import disk_error

FLAG_BYTES = 8
_FREE = bytes(FLAG_BYTES)


class _Private(threading.local):
    """Where a thread copies to; kept, so that its pages stay warm."""

    def __init__(self) -> None:
        self.buffer = bytearray()

    def room(self, nbytes: int) -> memoryview:
        if len(self.buffer) < nbytes:
            self.buffer = bytearray(nbytes)
        return memoryview(self.buffer)[:nbytes]


_private = _Private()


class Segment:
    """One shared file. Any number of threads; whoever closes it sees to it that nobody reads any more."""

    def __init__(self, directory: Path, size: int) -> None:
        """LimitExceededError: the disk is full."""
        self.name = secrets.token_hex(16)
        self.path = (directory / self.name).absolute()
        self.size = size
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(
                self._descriptor, 0, size
            )  # a hole would end the caller with SIGBUS on a full disk
        except OSError as error:
            self.close()
            raise disk_error(error) from error

    def take(self, offset: int, nbytes: int) -> memoryview:
        """Copies bytes out and frees their place; valid until this thread takes again.

        InvalidArgumentError: they do not lie in the segment.
        """
        if not FLAG_BYTES <= offset <= self.size - nbytes:
            raise InvalidArgumentError(
                "segment_offset", f"{nbytes} bytes at {offset} are not within 8..{self.size}"
            )
        private = _private.room(nbytes)
        if os.preadv(self._descriptor, [private], offset) != nbytes:
            raise InvalidArgumentError("segment", "the file was cut short")
        os.pwrite(self._descriptor, _FREE, offset - FLAG_BYTES)
        return private

    def unlink(self) -> None:
        """Takes the name away; who has it open keeps it."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        self.unlink()
        os.close(self._descriptor)
