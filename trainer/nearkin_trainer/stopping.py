"""What Ctrl-C and SIGTERM do: the first winds a job up, another one ends this process at once.

Only the standard library is imported, so that this is in force while everything else is being imported.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

SHOW_CURSOR = b"\x1b[?25h"  # progress bars hide it


class Stopped(KeyboardInterrupt):
    """Raised in the main thread by the first signal."""

    def __init__(self, number: int) -> None:
        super().__init__(words(number))
        self.status = 128 + number


def words(number: int) -> str:
    """What is said to people."""
    what = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
    return f"nearkin-train: {what}; --resume continues after the last finished epoch"


class Stopping:
    """A context manager: handles the signals of this process, unless somebody has it ignore them.

    They end it at once, which loses nothing as long as nothing is open; once `wind_up` was called they
    raise `Stopped` first.

    Args:
        numbers: the signals.
        speaks: whether to say so.
        stays: the process ends after this; signals that come still end it, with the status it has by then.
    """

    def __init__(self, *numbers: int, speaks: bool, stays: bool) -> None:
        self._speaks, self._stays = speaks, stays
        self._winds_up, self._status = False, 0
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # others may not handle signals
            handlers = {number: signal.getsignal(number) for number in numbers}
            self._before = {n: handler for n, handler in handlers.items() if handler != signal.SIG_IGN}

    def __enter__(self) -> Self:
        for number in self._before:
            signal.signal(number, self._stop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, self._end if self._stays and error is None else handler)

    def wind_up(self) -> None:
        """From here on the first signal raises `Stopped`."""
        self._winds_up = True

    def ends_with(self, status: int) -> int:
        """Notes the status that the process ends with, and returns it."""
        self._status = status
        return status

    def _stop(self, number: int, _: FrameType | None) -> None:
        if self._winds_up:
            self._winds_up = False
            raise Stopped(number)
        # Past Python's buffers: this may have come in the middle of a print.
        if self._speaks:
            os.write(2, f"{words(number)}\n".encode())
        if os.isatty(1):
            os.write(1, SHOW_CURSOR)
        os._exit(128 + number)

    def _end(self, _: int, __: FrameType | None) -> None:
        os._exit(self._status)
