"""One training rank, for processes that tests start: imports nothing that is slow to import."""

from __future__ import annotations

from typing import Any

import numpy as np
from nearkin_client import NeighbourClient


def push_and_fetch(address: str, run: str, rank: int, answers: Any) -> None:
    """Push a third of 60 rows, fetch the table, and put its bytes into the queue `answers`."""
    rows = np.random.default_rng(1).standard_normal((60, 8)).astype(np.float32)
    lo = rank * 20
    with NeighbourClient(address, run=run) as client:
        client.push(rows[lo : lo + 20], epoch=1, row_start=lo, num_classes=60, k=5)
        table = client.table(epoch=1, timeout=30)
        assert table.scores is not None
        answers.put((table.ids.tobytes(), table.scores.tobytes(), table.generation))
