"""A service of one's own: started on a private unix socket, and gone when its owner is."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from nearkin_client import guard
from nearkin_client.client import NeighbourClient
from nearkin_client.errors import DeadlineExceeded, NearkinError, ServiceNotInstalled, Unavailable
from nearkin_client.patience import Patience

log = logging.getLogger("nearkin.client.local")


class LocalService:
    """A `nearkin-serve` process of this process; a context manager, or `start()` and `stop()`.

    It listens on a unix socket in a temporary directory that only this user can enter, and ends with this
    process, however that ends. What it published stays in `data_dir`.

    Args:
        data_dir: where its runs live; a temporary directory, removed at the end, by default.
        listen: further addresses to listen on, such as "127.0.0.1:50051".
        options: further arguments of `nearkin-serve`.
        log_path: where its output goes; by default into the temporary directory.
        start_seconds: how long it may take until it answers.

    Attributes:
        address: its unix socket, for `NeighbourClient`.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str] | None = None,
        *,
        listen: Sequence[str] = (),
        options: Sequence[str] = (),
        log_path: str | os.PathLike[str] | None = None,
        start_seconds: float = 60.0,
    ) -> None:
        # Not below data_dir: the path of a unix socket may not be longer than about 100 bytes.
        self._scratch = Path(tempfile.mkdtemp(prefix="nearkin-"))
        self.data_dir = Path(data_dir) if data_dir is not None else self._scratch / "data"
        self._socket = self._scratch / "service.sock"
        self.address = f"unix://{self._socket}"
        self.log_path = Path(log_path) if log_path is not None else self._scratch / "service.log"
        self._listen = (self.address, *listen)
        self._options = tuple(options)
        self._start_seconds = start_seconds
        self._guard: subprocess.Popen[bytes] | None = None
        self._pid = 0

    @property
    def pid(self) -> int:
        """The service's process id; 0 while it is not running."""
        return self._pid

    @property
    def running(self) -> bool:
        """Whether its process is alive."""
        return self._guard is not None and self._guard.poll() is None

    def start(self) -> Self:
        """Start it and wait until it answers.

        Raises:
            ServiceNotInstalled: there is no `nearkin-serve` beside this interpreter or on PATH.
            Unavailable: it ended, or did not answer in time; the end of its output is in the message.
        """
        if self.running:
            return self
        command = [serve_command(), "--data-dir", str(self.data_dir)]
        for address in self._listen:
            command += ["--listen", address]
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._socket.unlink(missing_ok=True)  # a killed service left it
        self._spawn([*command, *self._options])
        self._wait_until_ready()
        log.info("private service on %s, data in %s", self.address, self.data_dir)
        return self

    def stop(self) -> None:
        """Ask it to end, wait for it, and remove what was temporary. Idempotent."""
        self._end()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def restart(self) -> None:
        """Stop it properly and start it again on the same addresses and data."""
        self._end()
        self.start()

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would; `start()` brings it back."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
        self._end()

    def output(self, lines: int = 20) -> str:
        """The last lines it printed."""
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def _spawn(self, command: list[str]) -> None:
        with self.log_path.open("ab") as output:
            self._guard = subprocess.Popen(  # noqa: S603 - nearkin-serve with our own arguments
                [sys.executable, "-I", "-S", guard.__file__, str(self._scratch), *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for us; the service ends when we do
            )
        assert self._guard.stdout is not None
        self._pid = int(self._guard.stdout.readline() or 0)

    def _wait_until_ready(self) -> None:
        end = time.monotonic() + self._start_seconds
        problem: NearkinError | str | None = "there is no socket"
        while self.running and time.monotonic() < end:
            time.sleep(0.02)
            if not self._socket.exists():
                continue
            problem = self._problem()
            if problem is None:
                return
            if not isinstance(problem, Unavailable | DeadlineExceeded):
                break
        what = f"does not answer ({problem})" if self.running else "ended while it started"
        said = self.output() or f"nothing; is there room in {self.log_path.parent}?"
        self._end()
        raise Unavailable(f"the private service {what}; it said:\n{said}")

    def _problem(self) -> NearkinError | None:
        """Why it cannot be used, or None when it can."""
        with NeighbourClient(self.address, patience=Patience(call=1.0, outage=0.2)) as client:
            try:
                client.server_info()
            except NearkinError as error:
                return error
        return None

    def _end(self) -> None:
        if self._guard is None:
            return
        for pipe in (self._guard.stdin, self._guard.stdout):
            if pipe is not None:
                pipe.close()
        self._guard.wait()
        self._guard, self._pid = None, 0

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:  # then nobody calls `__exit__`
            self.stop()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def serve_command() -> str:
    """The path of `nearkin-serve`: beside this interpreter, else on PATH."""
    beside = Path(sys.executable).parent / "nearkin-serve"
    found = str(beside) if beside.exists() else shutil.which("nearkin-serve")
    if found is None:
        raise ServiceNotInstalled(
            "nearkin-serve is not installed here; `pip install 'nearkin-service[cpu]'` brings it, "
            "or name a service that runs elsewhere"
        )
    return found
