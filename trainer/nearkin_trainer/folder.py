"""The folder that a job writes to: for one job at a time, and without what another could not finish."""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from nearkin_trainer.checkpoint import remove_unfinished
from nearkin_trainer.distributed import World, fail_together

logger = logging.getLogger("nearkin.trainer.folder")

LOCK = ".lock"
PATIENCE_SECONDS = 10.0  # for a job that was told to end, and that this one is started in the place of


@contextlib.contextmanager
def claim(world: World, out: Path) -> Iterator[None]:
    """Makes the folder if there is none, and keeps other jobs out of it; all processes call this.

    Raises:
        ValueError: it cannot be made, or written to, or another job has it.
        OtherProcessFailed: so the job's first process says.
    """
    with contextlib.ExitStack() as held:
        error = None
        if world.leads:
            try:
                held.callback(os.close, _lock(out))
                remove_unfinished(out)
            except OSError as refused:
                error = ValueError(f"out={out} cannot be written to: {refused.strerror or refused}")
            except ValueError as refused:
                error = refused
        fail_together(world, error)
        yield


def _lock(out: Path) -> int:
    """Its descriptor; whoever has it open has the folder, and the system closes it however a process ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out={out} is no folder and cannot be made one: {error.strerror}") from error
    descriptor = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _wait_for(descriptor, out)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _wait_for(descriptor: int, out: Path) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    try:
        if _is_ours(descriptor):
            return
        logger.info("%s is in use by another job; waiting up to %g s", out, PATIENCE_SECONDS)
        while not _is_ours(descriptor):
            if time.monotonic() > end:
                raise ValueError(
                    f"out={out} is in use by another nearkin-train: wait for its end, or name another folder"
                )
            time.sleep(0.1)
    except OSError as error:  # not every network's file system has locks
        logger.info("%s cannot be locked (%s): see to it that no other job uses it", out, error.strerror)


def _is_ours(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
