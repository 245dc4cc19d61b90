"""A training worker, for processes that tests start and kill: imports nothing that is slow to import."""

from __future__ import annotations

from typing import Any

import numpy as np
from nearkin_client import NeighbourClient
from nearkin_client.errors import NearkinError
from numpy.typing import NDArray


def rows_of(epoch: int, classes: int, dimensions: int) -> NDArray[np.float32]:
    """What the epoch consists of, whoever sends it."""
    repeated: NDArray[np.float32] = np.tile(
        np.random.default_rng(epoch).standard_normal((classes, 64), np.float32), (1, dimensions // 64)
    )
    return repeated


def push(address: str, run: str, epoch: int, shape: tuple[int, int], shared: bool, ready: Any) -> None:
    """Pushes the epoch in a few streams; `ready` is set when it begins.

    That somebody aborted the push meanwhile is no matter.
    """
    rows = rows_of(epoch, *shape)
    step = len(rows) // 6
    with NeighbourClient(address, run=run, shared_memory="auto" if shared else False) as client:
        client.server_info()  # the connection stands
        ready.set()
        try:
            for at in range(0, len(rows), step):
                part = rows[at : at + step]
                client.push(part, epoch=epoch, k=4, row_start=at, num_classes=len(rows))
        except NearkinError:
            return
