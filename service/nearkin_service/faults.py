"""Named moments at which a test may have this process killed, as a power cut would kill it.

`NEARKIN_FAULT=publish.renamed` kills it when it comes there, `publish.renamed:3` when it comes there for the
third time. Without the variable a point costs one look at a name. Deliberately nothing but SIGKILL: what must
survive is what is on disk at that moment.
"""

from __future__ import annotations

import os
import signal
import threading

VARIABLE = "NEARKIN_FAULT"

POINTS = (
    "start.locked",
    "start.prepared",
    "start.trash_emptied",
    "start.recovered",
    "start.listening",
    "document.written_aside",
    "document.renamed",
    "run.directories_made",
    "run.made",
    "push.rows_made",
    "push.described",
    "write.rows_written",
    "write.noted",
    "write.absent_noted",
    "commit.noted",
    "build.begun",
    "build.flushing_rows",
    "build.done",
    "publish.tables_written",
    "publish.rows_linked",
    "publish.described",
    "publish.renamed",
    "publish.durable",
    "publish.numbered",
    "publish.push_gone",
    "embeddings.flushed",
    "retention.decided",
    "retention.state_written",
    "retention.rows_gone",
    "discard.renamed",
    "outcome.written",
)
"""Every state of a start, a push, a build, a publication, a retention sweep and a removal."""


class _Fault:
    """Counts down the visits to one point."""

    def __init__(self, setting: str) -> None:
        """ValueError: there is no such point."""
        self.point, _, times = setting.partition(":")
        if self.point not in POINTS:
            raise ValueError(f"{VARIABLE}={setting}: there is no such point")
        self._left = int(times or 1)
        self._lock = threading.Lock()

    def visit(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


_fault = _Fault(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None


def point(name: str) -> None:
    """Where the process may be killed."""
    if _fault is not None and _fault.point == name:
        _fault.visit()
