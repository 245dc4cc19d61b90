"""A run as one tar file, to be taken to another data directory: its generations, tables and embeddings.

What a build held in reserve stays behind, as does what stands before the rows of a file: versions that know
neither can restore the run then, and all it costs is that the first update is a full build.
"""

from __future__ import annotations

import io
import json
import re
import secrets
import shutil
import tarfile
from pathlib import Path

from nearkin_service.errors import DataLossError
from nearkin_service.store import generation_files as gens
from nearkin_service.store.atomic import fsync_directory, fsync_file, read_document
from nearkin_service.store.layout import FORMAT_VERSION, Layout
from nearkin_service.store.push_files import JOURNAL, ROWS
from nearkin_service.store.reserve import RESERVE
from nearkin_service.store.rows import begins_at
from nearkin_service.values import PushSpec

_ABOUT = "snapshot.json"
_FILES = (gens.MANIFEST, gens.IDS, gens.SCORES, gens.ABSENT, gens.EMBEDDINGS, gens.PINNED, ROWS, JOURNAL)
_MEMBER = re.compile(rf"run\.json|generations/[1-9]\d{{0,17}}/({'|'.join(map(re.escape, _FILES))})")


def save(root: Path, run: str, file: Path) -> int:
    """Writes the published generations of a run; returns how many. The directory must not be served.

    ValueError: no such run, or the file exists. DataLossError: a table is damaged.
    """
    source = Layout(root).run(run)
    if not source.is_dir():
        raise ValueError(f"there is no run {run!r} in {root}")
    numbers = sorted(int(p.name) for p in (source / "generations").iterdir() if p.name.isdecimal())
    with tarfile.open(file, "x") as archive:
        about = json.dumps({"format": FORMAT_VERSION, "run": run, "generations": len(numbers)}).encode()
        entry = tarfile.TarInfo(_ABOUT)
        entry.size = len(about)
        archive.addfile(entry, io.BytesIO(about))
        archive.add(source / "run.json", "run.json")
        for number in numbers:
            spec = gens.read_tables(source / "generations" / str(number), run, number).spec
            for path in sorted((source / "generations" / str(number)).iterdir()):
                name = f"generations/{number}/{path.name}"
                if path.name == ROWS:
                    _add_rows(archive, path, name, spec)
                elif path.name != RESERVE:
                    archive.add(path, name)
    fsync_file(file)
    return len(numbers)


def _add_rows(archive: tarfile.TarFile, path: Path, name: str, spec: PushSpec) -> None:
    entry = archive.gettarinfo(path, name)
    before = begins_at(entry.size, spec) or 0
    entry.size -= before
    with path.open("rb") as rows:
        rows.seek(before)
        archive.addfile(entry, rows)


def restore(root: Path, file: Path) -> str:
    """Puts a saved run into a data directory that is not being served; returns its name.

    Extracted aside, verified, then there by one rename. ValueError: the run exists, or this is no snapshot.
    """
    layout = Layout(root)
    layout.prepare()
    aside = layout.trash / secrets.token_hex(8)  # a start after a death empties it
    try:
        with tarfile.open(file) as archive:
            run = _extract(archive, aside)
        if layout.run(run).exists():
            raise ValueError(f"there is a run {run!r} already; delete it first")
        for path in (aside / "generations").iterdir():
            gens.read_tables(path, run, int(path.name))
        aside.rename(layout.run(run))
    except (tarfile.TarError, KeyError, TypeError, EOFError, DataLossError) as error:
        raise ValueError(f"{file} cannot be restored: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    fsync_directory(layout.runs)
    return run


def _extract(archive: tarfile.TarFile, goal: Path) -> str:
    """Only plain files of the names that a run has; anything else is refused."""
    first = archive.next()
    about = archive.extractfile(first) if first is not None and first.name == _ABOUT else None
    if about is None:
        raise ValueError("this is no snapshot of a run")
    described = json.loads(about.read(1 << 16))
    if described["format"] != FORMAT_VERSION:
        raise ValueError(f"the snapshot has format {described['format']}, not {FORMAT_VERSION}")
    for each in ("generations", "pushes"):
        (goal / each).mkdir(parents=True)
    for member in archive:
        _extract_file(archive, member, goal)
    read_document(goal / "run.json")
    for directory in (goal / "generations", goal):
        fsync_directory(directory)
    return str(described["run"])


def _extract_file(archive: tarfile.TarFile, member: tarfile.TarInfo, goal: Path) -> None:
    if member.name == _ABOUT:
        return
    content = archive.extractfile(member) if member.isreg() and _MEMBER.fullmatch(member.name) else None
    if content is None:
        raise ValueError(f"{member.name[:100]!r} does not belong into a snapshot")
    path = goal / member.name
    path.parent.mkdir(exist_ok=True)
    with path.open("xb") as out:
        shutil.copyfileobj(content, out, 1 << 20)
    fsync_file(path)
