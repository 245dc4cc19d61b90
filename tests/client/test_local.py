"""A private service: there when it is asked for, and gone with its owner however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from nearkin_client import NeighbourClient, ServiceNotInstalled, Unavailable
from nearkin_client.local import LocalService
from nearkin_client.testing import neighbour_service

OWNER = """
import os, sys, time
from nearkin_client.local import LocalService
service = LocalService().start()
print(service.pid, service.address, flush=True)
if sys.argv[1] == "forks" and os.fork() == 0:
    time.sleep(3)  # holds every descriptor of its parent
    os._exit(0)
time.sleep(60)
"""


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that ended and waits to be collected does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone_within(seconds: float, pid: int) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and is_alive(pid):
        time.sleep(0.02)
    return not is_alive(pid)


def test_it_serves_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with LocalService(tmp_path / "data") as service:
        assert service.running
        socket = Path(service.address.removeprefix("unix://"))
        assert socket.stat().st_mode & 0o777 == 0o600 or socket.parent.stat().st_mode & 0o777 == 0o700
        with NeighbourClient(service.address, run="r") as client:
            client.push(np.eye(5, dtype=np.float32), epoch=0, k=2)
            client.table(epoch=0, timeout=30)
        pid = service.pid
    assert not is_alive(pid)
    assert not socket.parent.exists()
    with LocalService(tmp_path / "data") as service, NeighbourClient(service.address, run="r") as client:
        assert client.table().generation == 1


def test_one_that_does_not_start_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the data directory's disk, or that of its log, is full."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with (
        pytest.raises(Unavailable, match="is there room in /dev"),
        LocalService(options=["--engine", "none"], log_path="/dev/null"),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["killed", "forks"])
def test_it_dies_with_its_owner(how: str) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, how], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid, address = owner.stdout.readline().split()
        scratch = Path(address.removeprefix("unix://")).parent
        assert is_alive(int(pid))
        assert scratch.is_dir()
        owner.kill()
        assert gone_within(15, int(pid))
    end = time.monotonic() + 15
    while scratch.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not scratch.exists(), "its data may be gigabytes"


def test_it_dies_even_if_its_guard_is_killed() -> None:
    with LocalService() as service:
        pid = service.pid
        guard = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(guard, signal.SIGKILL)
        assert gone_within(10, pid)


def test_kill_and_start_again() -> None:
    with neighbour_service() as service:
        first = service.pid
        service.kill()
        assert not is_alive(first)
        service.start()
        assert is_alive(service.pid)
        assert service.pid != first


def test_it_listens_where_it_is_told_as_well() -> None:
    with neighbour_service(listen=("127.0.0.1:0",)) as service, NeighbourClient(service.address) as client:
        assert client.runs() == ()


def test_what_it_said_is_in_the_error_if_it_does_not_start() -> None:
    service = LocalService(options=["--no-such-option"])
    try:
        with pytest.raises(Unavailable, match="no-such-option"):
            service.start()
        assert not service.running
    finally:
        service.stop()


def test_a_missing_service_is_said_plainly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServiceNotInstalled, match="pip install"), LocalService():
        pass
