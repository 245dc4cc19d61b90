"""`reserve.bin`: neighbours after the k-th, which a later update starts from. No reader is ever given it.

It holds ids int32 [N, m] and then scores float32 [N, m], -1 and -inf where nothing is known.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from nearkin.v1.checksums import crc32c
from numpy.typing import NDArray

from nearkin_service.engines.contract import Neighbours
from nearkin_service.errors import DataLossError
from nearkin_service.store.rows import as_bytes
from nearkin_service.values import Generation, ReserveFile

RESERVE = "reserve.bin"


def write_reserve(directory: Path, reserve: Neighbours | None) -> ReserveFile | None:
    """On disk when this returns; None if there is nothing to keep."""
    if reserve is None or not reserve.ids.size:
        return None
    parts = np.ascontiguousarray(reserve.ids, "<i4"), np.ascontiguousarray(reserve.scores, "<f4")
    checksum = 0
    with (directory / RESERVE).open("wb") as file:
        for part in parts:
            file.write(as_bytes(part))
            checksum = crc32c(as_bytes(part), checksum)
        file.flush()
        os.fsync(file.fileno())
    return ReserveFile(reserve.ids.shape[1], checksum)


def verified_reserve(directory: Path, generation: Generation) -> Neighbours | None:
    """As it was written; None if there never was one. DataLossError: damaged. OSError: gone."""
    about = generation.reserve
    if about is None:
        return None
    size = (directory / RESERVE).stat().st_size
    if about.places < 1 or size != generation.reserve_bytes:
        raise DataLossError(f"{RESERVE} has {size} bytes, not {generation.reserve_bytes}")
    data: NDArray[np.int32] = np.fromfile(directory / RESERVE, "<i4")
    if crc32c(as_bytes(data)) != about.crc32c:
        raise DataLossError(f"{RESERVE} does not match its checksum")
    ids, scores = data.reshape(2, generation.spec.num_classes, about.places)
    return Neighbours(ids, scores.view("<f4"))
