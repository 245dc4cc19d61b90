"""Keys on a device of torch: rows leave as they are, and become keys there.

A GPU takes rows several times as fast from memory that is pinned, while the next ones are being read. Only
their lengths are summed on the host, so that keys are the same bits as everywhere.

Dimension letters: M keys, D elements of a key, B rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.contract import BuildMonitor
from nearkin_service.engines.keys import KeyedRows, rows_at_once
from nearkin_service.engines.mixed.held import ImpliedKeys, KeptKeys, Keys
from nearkin_service.engines.mixed.products import aligned
from nearkin_service.engines.pacing import Pace
from nearkin_service.engines.workers import in_threads

_PIECE_BYTES = 1 << 26


def keys_on(
    device: str, source: KeyedRows, present: NDArray[np.int64], monitor: BuildMonitor
) -> tuple[Keys, Any]:
    """The keys of present classes, as the host has them, and float32 [M, D] on the device."""
    import torch

    shape = len(present), source.key_size
    on_device_MD = torch.empty(shape, dtype=torch.float32, device=device)
    if ImpliedKeys.possible(source):
        implied = ImpliedKeys(source, present, monitor)

        def fill_with_rows(some: slice, room_BD: NDArray[np.float32]) -> None:
            np.take(source.rows, present[some], axis=0, out=room_BD, mode="clip")  # else it copies twice
            implied.factors_M[some] = source.factors_of(room_BD, present[some])

        _send(fill_with_rows, on_device_MD, monitor)
        _multiply(on_device_MD, implied.factors_M)
        return implied, on_device_MD
    keys_MD = aligned(shape, np.float32)

    def fill_with_keys(some: slice, room_BD: NDArray[np.float32]) -> None:
        ids = present[some]
        source.write_keys(keys_MD[some], source.rows[ids], ids, "class")
        room_BD[:] = keys_MD[some]

    _send(fill_with_keys, on_device_MD, monitor)
    return KeptKeys(keys_MD), on_device_MD


def _multiply(rows_MD: Any, factors_M: NDArray[np.float64]) -> None:
    """Each row times its factor, rounded once, in place."""
    import torch

    on_device_M = torch.from_numpy(factors_M).to(rows_MD.device)
    for some in _pieces(rows_MD):
        rows_MD[some] = (rows_MD[some].double() * on_device_M[some, None]).float()


def _send(
    fill: Callable[[slice, NDArray[np.float32]], None], on_device_MD: Any, monitor: BuildMonitor
) -> None:
    """Send pieces, each filled by several threads while the one before is on its way."""
    count, size = on_device_MD.shape
    block = rows_at_once(size)
    pieces = _pieces(on_device_MD)
    ferries = [_Ferry(max((p.stop - p.start for p in pieces), default=0), on_device_MD) for _ in range(2)]
    pace = Pace(monitor, "keys", count)
    for number, piece in enumerate(pieces):
        ferry = ferries[number % 2]
        room_BD = ferry.back()

        def fill_block(top: int, piece: slice = piece, room_BD: NDArray[np.float32] = room_BD) -> None:
            some = slice(top, min(piece.stop, top + block))
            fill(some, room_BD[some.start - piece.start : some.stop - piece.start])

        in_threads(fill_block, range(piece.start, piece.stop, block), lambda done: monitor.check())
        ferry.leave(on_device_MD[piece])
        pace.done(piece.stop)


def _pieces(keys_MD: Any) -> list[slice]:
    count, size = keys_MD.shape
    step = max(1, _PIECE_BYTES // (4 * size))
    return [slice(start, min(count, start + step)) for start in range(0, count, step)]


class _Ferry:
    """Room for rows on their way to a device."""

    def __init__(self, rows: int, like_MD: Any) -> None:
        import torch

        self._on_gpu = like_MD.device.type == "cuda"
        self._rows = torch.empty((rows, like_MD.shape[1]), dtype=like_MD.dtype, pin_memory=self._on_gpu)
        self._left: Any = None

    def back(self) -> NDArray[np.float32]:
        """The room, once what it held has arrived."""
        if self._left is not None:
            self._left.synchronize()
        return np.asarray(self._rows.numpy())

    def leave(self, target: Any) -> None:
        """Copy the first rows to the device, which may take until `back`."""
        import torch

        target.copy_(self._rows[: len(target)], non_blocking=True)
        if self._on_gpu:
            self._left = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._left.record()
