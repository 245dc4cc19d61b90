"""Data directories that nobody serves: verified, taken elsewhere, and read in the format of version 1."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service.engines import ways

from tests.service.conftest import Service, brute_force, random_rows

Start = Callable[..., Service]
ROWS = random_rows(30, 8)
FORMAT_1 = Path(__file__).with_name("fixtures") / "format-1"


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "nearkin_service", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


@pytest.fixture
def left(start_service: Start, tmp_path: Path) -> Path:
    """A data directory with two generations and an open push, whose service has ended."""
    service = start_service()
    caller = service.caller()
    caller.push(ROWS, 0)
    caller.push(ROWS + 1, 1)
    caller.write(caller.begin(ROWS, 2).push.push_id, ROWS[:10])
    service.stop()
    return tmp_path / "data"


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_sound_directory_is_sound_and_stays_as_it_was(left: Path) -> None:
    before = contents(left)
    done = command("check", left)
    assert (done.returncode, done.stdout) == (0, "3 sound, 0 note, 0 damaged\n")
    assert contents(left) == before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/run/generations/1/ids.bin", "ids.bin does not match its checksum"),
        ("runs/run/generations/2/scores.bin", "scores.bin does not match its checksum"),
        ("runs/run/generations/2/manifest.json", "manifest.json"),
        ("runs/run/generations/2/rows.bin", "the table is sound; embeddings"),
        ("runs/run/run.json", "run.json"),
    ],
)
def test_a_flipped_bit_is_found(left: Path, name: str, said: str) -> None:
    data = bytearray((left / name).read_bytes())
    data[len(data) // 2] ^= 1
    (left / name).write_bytes(data)
    done = command("check", left, "--json")
    assert done.returncode == 1
    (damaged,) = [each for each in map(json.loads, done.stdout.splitlines()) if each["state"] == "damaged"]
    assert name.startswith(damaged["path"])
    assert said in damaged["what"]


@pytest.fixture
def left_with_reserve(start_service: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(ways, "AT_ONCE", 0)
    service = start_service()
    service.caller().push(ROWS, 0)
    service.stop()
    return tmp_path / "data"


def test_a_reserve_is_looked_at_and_missed_by_nobody(left_with_reserve: Path) -> None:
    path = left_with_reserve / "runs/run/generations/1/reserve.bin"
    data = bytearray(path.read_bytes())
    assert command("check", left_with_reserve).stdout == "1 sound, 0 note, 0 damaged\n"
    data[5] ^= 1
    path.write_bytes(data)
    done = command("check", left_with_reserve)
    assert done.returncode == 0
    assert "reserve.bin does not match its checksum; updates" in done.stdout
    path.unlink()
    assert command("check", left_with_reserve).stdout == "1 sound, 0 note, 0 damaged\n"


def test_a_snapshot_leaves_the_reserve_behind(
    left_with_reserve: Path, start_service: Start, tmp_path: Path
) -> None:
    file, elsewhere = tmp_path / "run.tar", tmp_path / "elsewhere"
    assert command("snapshot", "save", file, "--run", "run", "--data-dir", left_with_reserve).returncode == 0
    assert command("snapshot", "restore", file, "--data-dir", elsewhere).returncode == 0
    assert not (elsewhere / "runs/run/generations/1/reserve.bin").exists()
    assert command("check", elsewhere).returncode == 0
    caller = start_service(data_dir=elsewhere).caller()
    rows = ROWS.copy()
    rows[3] = -rows[3]
    caller.push(rows, 1)
    np.testing.assert_array_equal(caller.table(min_epoch=1).ids, brute_force(rows, 5))
    assert (elsewhere / "runs/run/generations/2/reserve.bin").exists()


@pytest.mark.parametrize("rows_at", [0, 48])
def test_in_a_snapshot_rows_begin_where_every_version_looks_for_them(
    start_service: Start, tmp_path: Path, rows_at: int
) -> None:
    service = start_service()
    service.caller().push(ROWS, 0, rows_at=rows_at)
    service.stop()
    file, elsewhere = tmp_path / "run.tar", tmp_path / "elsewhere"
    held = (tmp_path / "data/runs/run/generations/1/rows.bin").read_bytes()
    assert held[rows_at:] == ROWS.tobytes()
    assert command("snapshot", "save", file, "--run", "run", "--data-dir", tmp_path / "data").returncode == 0
    assert command("snapshot", "restore", file, "--data-dir", elsewhere).returncode == 0
    assert (elsewhere / "runs/run/generations/1/rows.bin").read_bytes() == ROWS.tobytes()
    assert command("check", elsewhere).stdout == "1 sound, 0 note, 0 damaged\n"


def test_what_cannot_be_checked_is_said(start_service: Start, tmp_path: Path) -> None:
    start_service()
    for directory, said in ((tmp_path / "data", "in use"), (tmp_path / "nowhere", "not a directory")):
        done = command("check", directory)
        assert done.returncode == 2
        assert said in done.stderr
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("words", [["check"], ["snapshot", "save", "run.tar", "--run", "run", "--data-dir"]])
def test_what_only_reads_leaves_nothing_behind(left: Path, tmp_path: Path, words: list[str]) -> None:
    """Neither beside what is no data directory, nor in a copy without its lock."""
    words = [str(tmp_path / word) if word.endswith(".tar") else word for word in words]
    other = tmp_path / "other"
    other.mkdir()
    done = command(*words, other)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{other} is no data directory: it has no nearkin.json" in done.stderr
    assert list(other.iterdir()) == []
    (left / "LOCK").unlink()
    before = contents(left)
    assert command(*words, left).returncode == 0
    assert contents(left) == before


def test_a_run_moves_to_another_service(left: Path, start_service: Start, tmp_path: Path) -> None:
    file, elsewhere = tmp_path / "run.tar", tmp_path / "elsewhere"
    saved = command("snapshot", "save", file, "--run", "run", "--data-dir", left)
    assert saved.returncode == 0, saved.stderr
    assert command("snapshot", "restore", file, "--data-dir", elsewhere).returncode == 0
    again = command("snapshot", "restore", file, "--data-dir", elsewhere)
    assert (again.returncode, "already" in again.stderr) == (2, True)
    caller = start_service(data_dir=elsewhere).caller()
    assert [g.generation for g in caller.generations()] == [2, 1]
    for number in (1, 2):
        np.testing.assert_array_equal(caller.table(generation=number).ids, brute_force(ROWS + number - 1, 5))
    assert caller.nearest([3]).rows[0].ids == caller.table().ids[3].tolist()
    caller.push(ROWS + 2, 2)
    assert caller.generation().generation == 3


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "generations/1/link", "run.json/../x"])
def test_a_snapshot_cannot_write_where_it_wants(left: Path, tmp_path: Path, name: str) -> None:
    file, goal = tmp_path / "run.tar", tmp_path / "elsewhere"
    command("snapshot", "save", file, "--run", "run", "--data-dir", left)
    with tarfile.open(file, "a") as archive:
        archive.add(__file__, name)
        archive.getmembers()[-1].name = name
    done = command("snapshot", "restore", file, "--data-dir", goal)
    assert done.returncode == 2
    assert "does not belong into a snapshot" in done.stderr
    assert not list((goal / "runs").iterdir())
    assert not list((goal / "trash").iterdir())
    assert not (tmp_path / "escaped").exists()


def test_a_damaged_snapshot_is_refused(left: Path, tmp_path: Path) -> None:
    file, goal = tmp_path / "run.tar", tmp_path / "elsewhere"
    command("snapshot", "save", file, "--run", "run", "--data-dir", left)
    data = bytearray(file.read_bytes())
    at = data.index((left / "runs/run/generations/1/ids.bin").read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    done = command("snapshot", "restore", file, "--data-dir", goal)
    assert (done.returncode, "does not match its checksum" in done.stderr) == (2, True)
    assert not list((goal / "runs").iterdir())


def test_format_1_is_read_for_ever(start_service: Start, tmp_path: Path) -> None:
    """A data directory that version 0.1.0 wrote: two generations, one pinned, and a push half there."""
    data = tmp_path / "data"
    shutil.copytree(FORMAT_1, data)
    assert command("check", data).returncode == 0
    caller = start_service(data_dir=data).caller()
    rows = random_rows(12, 4, seed=1)
    generations = {g.generation: g for g in caller.generations("old")}
    assert sorted(generations) == [1, 2]
    assert generations[1].pinned
    assert generations[2].absent_count == 1
    np.testing.assert_array_equal(caller.table(run="old", generation=1).ids, brute_force(rows, 3))
    np.testing.assert_array_equal(
        caller.table(run="old", generation=2).ids, brute_force(rows * 2 + 1, 3, absent=[5])
    )
    assert len(caller.nearest([1], run="old", generation=1).rows[0].ids) == 3
    (push,) = caller.stub.GetRun(pb.GetRunRequest(run="old")).pushes
    assert (push.epoch, push.rows_stored) == (2, 6)
    caller.write(push.push_id, rows[6:] + 2, start=6)
    np.testing.assert_array_equal(
        caller.table(run="old", min_epoch=2).ids, brute_force(rows + np.float32(2), 3)
    )
