"""Messages of rows in place that are sent as one say the same."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st
from nearkin.v1 import bulk
from nearkin_client.shared import joined

WIDTH = 5
PIECES = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 1), st.sampled_from("SUP")), max_size=12)


@given(PIECES, st.integers(1, 9))
def test_joined_messages_say_the_same(pieces: list[tuple[int, int, str]], most: int) -> None:
    """Pieces of some rows after a gap: sound or not in place, or as a payload."""
    rows = np.random.default_rng(0).standard_normal((100, WIDTH)).astype(np.float32)
    messages: list[bulk.WriteRows] = []
    at = 0
    for count, gap, kind in pieces:
        at += gap
        data: Any = rows[at : at + count].reshape(-1).view(np.uint8).data
        crc = crc32c(data)
        if kind == "P":
            messages.append(bulk.WriteRows("p", at, data, crc))
        else:
            nothing = memoryview(b"")
            messages.append(bulk.WriteRows("p", at, nothing, crc, count, "loan", sound=kind == "S"))
        at += count
    said = list(joined(iter(messages), 4 * WIDTH, most))
    assert _payloads(said) == _payloads(messages)
    assert _in_place(said) == _in_place(messages)
    for each in said:
        count = each.shared_row_count
        if count:
            assert each.crc32c == crc32c(rows[each.row_start : each.row_start + count].tobytes())
            assert count <= max(most, *(message.shared_row_count for message in messages))
    for one, next_one in itertools.pairwise(said):
        follows = next_one.row_start == one.row_start + one.shared_row_count and one.sound == next_one.sound
        if follows and one.shared_row_count and next_one.shared_row_count:
            assert one.shared_row_count + next_one.shared_row_count > most


def _payloads(messages: list[bulk.WriteRows]) -> list[bulk.WriteRows]:
    return [each for each in messages if not each.shared_row_count]


def _in_place(messages: list[bulk.WriteRows]) -> dict[int, bool]:
    """Every row that lies in place, and whether it is said to be sound."""
    return {
        row: each.sound
        for each in messages
        for row in range(each.row_start, each.row_start + each.shared_row_count)
    }
