"""Small files that are either the old one or the new one, never half: written aside, flushed, renamed.

A document is JSON, `{"body": …, "crc32c": …}`, the checksum being that of the body's canonical form.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from nearkin.v1.checksums import crc32c

from nearkin_service import faults
from nearkin_service.errors import DataLossError, disk_is_full


def write_document(path: Path, body: dict[str, Any]) -> None:
    """Replaces the document at `path`; it is on disk when this returns."""
    put_document(path, body, durable=True)
    fsync_directory(path.parent)


def put_document(path: Path, body: dict[str, Any], *, durable: bool = False) -> None:
    """The same for a process that dies, not yet for a machine."""
    aside = path.with_name(f".{path.name}.aside")
    try:
        _write(aside, "w", _document(body), durable=durable)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    faults.point("document.written_aside")
    aside.replace(path)
    faults.point("document.renamed")


def change_document(path: Path, body: dict[str, Any]) -> None:
    """The same for one that other files can make up for: on a full disk it is written where it lies.

    That takes no room, and what makes room must not need any. If the machine dies in that very moment, the
    document is damaged.
    """
    try:
        write_document(path, body)
    except OSError as error:
        if not (disk_is_full(error) and path.is_file()):
            raise
        _write(path, "r+", _document(body), durable=True)


def _document(body: dict[str, Any]) -> str:
    return json.dumps({"body": body, "crc32c": crc32c(_canonical(body))}, indent=1, allow_nan=False) + "\n"


def _write(path: Path, mode: str, text: str, *, durable: bool) -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.write(text)
        file.truncate()
        file.flush()
        if durable:
            os.fsync(file.fileno())


def read_document(path: Path) -> dict[str, Any]:
    """The body. DataLossError: the file is not what was written. FileNotFoundError: there is none."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise DataLossError(f"{path.name} is not a plain file")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        body, stored = document["body"], document["crc32c"]
        sound = isinstance(body, dict) and crc32c(_canonical(body)) == stored
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataLossError(f"{path.name} is not a document: {error}") from error
    if not sound:
        raise DataLossError(f"{path.name} does not match its checksum")
    found: dict[str, Any] = body
    return found


def require_plain_files(directory: Path) -> None:
    """DataLossError: something in it is no plain file.

    A link would have us read, or cut, what lies elsewhere; a pipe would have us wait for ever.
    """
    with os.scandir(directory) as entries:
        for entry in entries:
            if not entry.is_file(follow_symlinks=False):
                raise DataLossError(f"{entry.name} is not a plain file")


def fsync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Makes a file's bytes durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
