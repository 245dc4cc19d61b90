"""Runs a command, and ends it when whoever started this is gone or closes our standard input.

Run as a file of its own (`python guard.py SCRATCH COMMAND…`): it needs nothing but the standard library and
starts no threads, so that PR_SET_PDEATHSIG can be relied on: the command dies even if this process is killed.
Prints the command's process id as its first line. Removes the directory SCRATCH if who started this is gone.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1
_PATIENCE_SECONDS = 40.0


def main(scratch: str, command: list[str]) -> int:
    """Run `command`; its exit status, 128 + signal if a signal ended it."""
    libc = ctypes.CDLL(None, use_errno=True)
    child = subprocess.Popen(  # noqa: S603 - the command is our caller's own
        command,
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509 - no threads here
    )
    print(child.pid, flush=True)  # noqa: T201 - read by our caller
    ended, owner = os.pidfd_open(child.pid), os.pidfd_open(os.getppid())
    # The pipe alone would not do: forked children of our parent hold its other end open.
    readable, _, _ = select.select([sys.stdin.fileno(), ended, owner], [], [])
    if ended not in readable:
        child.terminate()
        try:
            child.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
    status = child.wait()
    if select.select([owner], [], [], 0)[0]:
        shutil.rmtree(scratch, ignore_errors=True)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
