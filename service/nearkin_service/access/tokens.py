"""Tokens: made here, kept as hashes in one small file, looked up anew as soon as that file changes.

A token is `nk_<id>_<secret>`: the id (8 hex digits) may be shown, the secret (256 random bits) is shown once.
The file keeps the SHA-256 of the secret. A slow hash would add nothing: there is no guessing 256 random bits.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nearkin_service.access.policy import Scope

log = logging.getLogger("nearkin.access")

_TOKEN = re.compile(r"nk_([0-9a-f]{8})_([A-Za-z0-9_-]{43})")
_RUN_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")
_VERSION = 1
_LONGEST_NAME = 64
_NOBODY_HASH = "0" * 64


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """One token as the file knows it.

    Attributes:
        token_id: the part that may be shown.
        scope: "read", "write" or "admin".
        runs: the runs it reaches; empty: all.
        name: a note of who has it.
        created: seconds since 1970.
        sha256: of the secret, hex.
    """

    token_id: str
    scope: str
    sha256: str = field(repr=False)
    runs: tuple[str, ...] = ()
    name: str = ""
    created: float = 0.0

    def __post_init__(self) -> None:
        Scope.named(self.scope)
        if not re.fullmatch(r"[0-9a-f]{8}", self.token_id) or not _HASH.fullmatch(self.sha256):
            raise ValueError("a token's id or hash is malformed")
        for run in self.runs:
            if not _RUN_NAME.fullmatch(run):
                raise ValueError(f"run {run!r} does not match {_RUN_NAME.pattern}")
        if len(self.name) > _LONGEST_NAME or not self.name.isprintable():
            raise ValueError(f"name {self.name[:80]!r} is not up to {_LONGEST_NAME} printable characters")

    @property
    def level(self) -> Scope:
        return Scope.named(self.scope)

    def reaches(self, run: str) -> bool:
        return not self.runs or run in self.runs


class TokenFile:
    """The file, written aside and renamed, readable by its owner only. Several commands may edit it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> tuple[TokenRecord, ...]:
        """FileNotFoundError: there is none. ValueError: it is not a token file."""
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            if document["version"] != _VERSION:
                raise ValueError(f"version {document['version']!r} is not {_VERSION}")  # noqa: TRY301
            return tuple(TokenRecord(**each | {"runs": tuple(each["runs"])}) for each in document["tokens"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{self.path.name} is not a token file: {error}") from error

    def create(self, scope: Scope, runs: tuple[str, ...] = (), name: str = "") -> str:
        """Adds a token and returns it: the only time that anyone can see it."""
        secret = secrets.token_urlsafe(32)
        record = TokenRecord(
            secrets.token_hex(4), scope.label, _hashed(secret), runs, name, round(time.time(), 3)
        )
        with self._edited() as tokens:
            tokens.append(record)
        return f"nk_{record.token_id}_{secret}"

    def revoke(self, token_id: str) -> None:
        """ValueError: no token has this id."""
        with self._edited() as tokens:
            kept = [each for each in tokens if each.token_id != token_id]
            if len(kept) == len(tokens):
                raise ValueError(f"there is no token {token_id!r}; `token list` shows their ids")
            tokens[:] = kept

    @contextmanager
    def _edited(self) -> Iterator[list[TokenRecord]]:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self.path.with_name(f".{self.path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tokens = list(self.read()) if self.path.exists() else []
            yield tokens
            self._write(tokens)
        finally:
            os.close(lock)

    def _write(self, tokens: list[TokenRecord]) -> None:
        document = {"version": _VERSION, "tokens": [asdict(each) for each in tokens]}
        aside = self.path.with_name(f".{self.path.name}.aside")
        aside.unlink(missing_ok=True)
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.flush()
            os.fsync(descriptor)
        aside.replace(self.path)


class TokenBook:
    """The tokens in force. Follows the file without a restart, and never opens a door that was closed.

    Once tokens were asked for they are, even if the file vanishes or is damaged.
    """

    def __init__(self, path: Path, *, required: bool = False) -> None:
        """ValueError: the file is there and cannot be read."""
        self._file = TokenFile(path)
        self._tokens: Mapping[str, TokenRecord] = {}
        self._seen: tuple[int, ...] | None = None
        self._required = required
        if path.exists():
            self._load()

    @property
    def in_force(self) -> bool:
        """Whether callers over the network need a token: as soon as there is a token file."""
        self._follow()
        return self._required

    def find(self, token: str) -> TokenRecord | None:
        """The record of a genuine token. Takes as long for a wrong secret as for an unknown id."""
        self._follow()
        match = _TOKEN.fullmatch(token)
        if match is None:
            return None
        record = self._tokens.get(match[1])
        genuine = hmac.compare_digest(_hashed(match[2]), record.sha256 if record else _NOBODY_HASH)
        return record if genuine else None

    def _follow(self) -> None:
        if _stamp(self._file.path) == self._seen:
            return
        try:
            self._load()
        except (OSError, ValueError) as error:
            self._seen = _stamp(self._file.path)
            self._tokens = {}
            log.error("no token is accepted until this is mended: %s", error)  # noqa: TRY400 - its own words

    def _load(self) -> None:
        stamp = _stamp(self._file.path)
        self._tokens = {each.token_id: each for each in self._file.read()}
        self._seen, self._required = stamp, True
        log.info("%d tokens are in force, from %s", len(self._tokens), self._file.path.name)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
