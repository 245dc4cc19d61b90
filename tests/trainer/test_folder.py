"""The output folder has one job at a time."""

from pathlib import Path

import pytest
from nearkin_trainer import folder
from nearkin_trainer.distributed import World
from nearkin_trainer.folder import claim


def test_two_jobs_cannot_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "PATIENCE_SECONDS", 0.0)
    with claim(World(), tmp_path / "out"):
        with (
            pytest.raises(
                ValueError, match=r"out=.*out is in use by another nearkin-train: .* another folder"
            ),
            claim(World(), tmp_path / "out"),
        ):
            pass
        with claim(World(), tmp_path / "other"):
            pass
    with claim(World(), tmp_path / "out"):
        pass


def test_what_a_killed_job_has_left_goes(tmp_path: Path) -> None:
    left = [".checkpoint.npz.4711.tmp", ".checkpoint-3-1-of-2.npz.4712.tmp", ".metrics.json.4711.tmp"]
    for name in [*left, "checkpoint.npz", ".mine.tmp", "notes.1.tmp"]:
        (tmp_path / name).touch()
    with claim(World(), tmp_path):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.npz", ".mine.tmp", "notes.1.tmp", folder.LOCK}


def test_a_folder_that_takes_no_files_is_said() -> None:
    with (
        pytest.raises(ValueError, match=r"^out=/proc/self cannot be written to: "),
        claim(World(), Path("/proc/self")),
    ):
        pass


def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with caplog.at_level("INFO", "nearkin"), claim(World(), tmp_path):
        assert "cannot be locked (Operation not supported)" in caplog.text
