"""Ctrl-C and SIGTERM, from outside and at the moments that are easy to miss."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.trainer.pictures import write_csv_set

SMALL = ("--image.height", "16", "--image.width", "16", "--model.width", "4", "--model.channels", "8")
BATCHES = ("--batch.classes", "2", "--batch.images", "2", "--batch.steps", "3", "--neighbour.k", "2")
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "stopped by SIGTERM"}
HANDLES = """
import time
from nearkin_trainer.stopping import Stopped, Stopping
with Stopping(2, 15, speaks=True, stays=True) as stopping:
    {before}
    try:
        print("ready", flush=True)
        time.sleep(60)
    except Stopped:
        print("winding up", flush=True)
        time.sleep(60)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def _catches(process: subprocess.Popen[str], number: signal.Signals) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_while_it_imports(tmp_path: Path, number: signal.Signals, processes: str) -> None:
    words = ("--data", str(tmp_path), "--out", str(tmp_path / "out"), "--processes", processes)
    with subprocess.Popen(
        [sys.executable, "-m", "nearkin_trainer", *words], stderr=subprocess.PIPE, text=True
    ) as command:
        while not _catches(command, signal.SIGTERM):  # SIGINT Python catches by itself, and with a traceback
            assert command.poll() is None
            time.sleep(0.002)
        command.send_signal(number)
        said = command.communicate(timeout=60)[1]
    assert command.returncode == STATUS[number]
    assert said == f"nearkin-train: {SAID[number]}; --resume continues after the last finished epoch\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("processes", ["1", "2"])
def test_sigterm_while_it_trains(tmp_path: Path, processes: str) -> None:
    data, out = write_csv_set(tmp_path, train_classes=4), tmp_path / "out"
    words = ("--data", str(data), "--out", str(out), "--processes", processes, "--epochs", "100000")
    with subprocess.Popen(
        [sys.executable, "-m", "nearkin_trainer", *words, *SMALL, *BATCHES, "--device", "cpu"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    ) as command:
        while not (out / "checkpoint.npz").exists():
            assert command.poll() is None
            time.sleep(0.05)
        command.terminate()
        said = command.communicate(timeout=120)[1]
    assert command.returncode == 143
    assert said.endswith("stopped by SIGTERM; --resume continues after the last finished epoch\n")
    assert "Traceback" not in said


def _handling(before: str) -> subprocess.Popen[str]:
    script = HANDLES.format(before=before)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", script], text=True, **pipes)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_the_second_one_ends_it_at_once(number: signal.Signals) -> None:
    with _handling("stopping.wind_up()") as process:
        assert process.stdout is not None
        for line in ("ready\n", "winding up\n"):
            assert process.stdout.readline() == line
            process.send_signal(number)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == STATUS[number]
    assert said.count(SAID[number]) == 1


def test_who_ignores_them_goes_on_ignoring_them() -> None:
    """As in a script's background job."""
    script = "import signal; signal.signal(2, signal.SIG_IGN)\n" + HANDLES.format(before="")
    script += "    \n".join(["", "import signal; assert signal.getsignal(2) == signal.SIG_IGN"])
    script = script.replace("time.sleep(60)", "pass")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60, stdout=subprocess.DEVNULL)
