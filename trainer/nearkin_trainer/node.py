"""Memory that the processes of one machine share: one writes, all read, one copy per machine."""

import logging
import math
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import DTypeLike, NDArray

from nearkin_trainer.distributed import World, tell_node

logger = logging.getLogger("nearkin.trainer.node")

_MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108 - a file of random name, for this user only, removed once mapped
_ROOM = 1.1


def wait_for_node(world: World) -> None:
    """Waits for the processes of this machine."""
    if world.local_size > 1:
        dist.barrier(group=world.node_group)


def node_array(world: World, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array that all processes of this machine see; every one of them calls this.

    The file behind it has no name any more when this returns, so that nothing is left behind however the job
    ends.

    Raises:
        RuntimeError: this machine has no room for it.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if world.local_size == 1 or size == 0:
        return np.empty(shape, dtype)
    path = tell_node(world, _reserve(size) if world.leads_node else None)
    if path.startswith("!"):
        raise RuntimeError(path[1:])
    with Path(path).open("r+b") as file:
        memory = mmap.mmap(file.fileno(), size)
    wait_for_node(world)
    if world.leads_node:
        Path(path).unlink()
    return np.frombuffer(memory, dtype).reshape(shape)


def _reserve(size: int) -> str:
    """The path of a new file of `size` bytes, in memory if there is room; `!` and why if there is none."""
    folder = _MEMORY_FOLDER
    if not os.access(folder, os.W_OK) or shutil.disk_usage(folder).free < _ROOM * size:
        folder = Path(tempfile.gettempdir())
        logger.info(
            "sharing %d bytes among this machine's processes through %s: no room in memory", size, folder
        )
    try:
        descriptor, path = tempfile.mkstemp(prefix="nearkin-", dir=folder)
        try:
            # Really reserved: a file that only looks large enough would kill the process that writes to it.
            os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"!no room for {size} bytes to share among this machine's processes in {folder}: {error}"
    return path
