"""`nearkin-serve check` and `snapshot save | restore`: work on a data directory that nobody serves."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from nearkin_service.errors import NearkinError
from nearkin_service.store import snapshots, verify
from nearkin_service.store.layout import ABOUT, DirectoryLock

DataDir = Annotated[Path, typer.Option(help="The data directory; no service may be using it.")]
snapshot = typer.Typer(help="Take runs from one data directory to another.", no_args_is_help=True)


def check(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A data directory that is not served.")],
    as_json: Annotated[bool, typer.Option("--json", help="One object per line.")] = False,
) -> None:
    """Verify every table and every row of a data directory; changes nothing.

    Exit status: 0 sound, 1 something is damaged, 2 it cannot be checked.
    """
    counts: Counter[str] = Counter()
    with _unserved(directory):
        for each in verify.verify(directory):
            counts[each.state] += 1
            if as_json:
                _say(json.dumps(asdict(each)))
            elif each.state != verify.SOUND:
                _say(f"{each.state}: {each.path}: {each.what}")
    if not as_json:
        _say(", ".join(f"{counts[state]} {state}" for state in (verify.SOUND, verify.NOTE, verify.DAMAGED)))
    if counts[verify.DAMAGED]:
        raise typer.Exit(1)


@snapshot.command()
def save(
    file: Annotated[Path, typer.Argument(help="The tar file to write.")],
    run: Annotated[str, typer.Option(help="Which run.")],
    data_dir: DataDir,
) -> None:
    """Write a run's generations, embeddings included, into one file."""
    with _unserved(data_dir):
        count = snapshots.save(data_dir, run, file)
    _say(f"run {run}: {count} generations in {file}")


@snapshot.command()
def restore(
    file: Annotated[Path, typer.Argument(help="What `snapshot save` wrote.")], data_dir: DataDir
) -> None:
    """Put a saved run into a data directory, which is made if it does not exist."""
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _unserved(data_dir, to_write=True):
        run = snapshots.restore(data_dir, file)
    _say(f"run {run} restored into {data_dir}")


@contextmanager
def _unserved(directory: Path, *, to_write: bool = False) -> Iterator[None]:
    """Holds the directory's lock; complaints become a line and exit status 2."""
    try:
        if not directory.is_dir():
            raise ValueError(f"{directory} is not a directory")  # noqa: TRY301
        if not to_write and not (directory / ABOUT).exists():
            raise ValueError(f"{directory} is no data directory: it has no {ABOUT}")  # noqa: TRY301
        lock = DirectoryLock(directory, to_write=to_write)
        try:
            yield
        finally:
            lock.release()
    except (ValueError, OSError, NearkinError) as error:
        print(f"nearkin-serve: {error}", file=sys.stderr)  # noqa: T201
        raise typer.Exit(2) from error


def _say(line: str) -> None:
    print(line)  # noqa: T201
