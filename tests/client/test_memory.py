"""Memory of dropped tables serves the next ones, and never one that somebody still holds."""

from __future__ import annotations

import gc

import numpy as np
from nearkin_client.memory import MOST_BYTES, TableMemory

SHAPE = (1000, 700)


def address(array: np.ndarray[tuple[int, ...], np.dtype[np.int32]]) -> int:
    return int(array.ctypes.data)


def test_what_is_dropped_serves_again() -> None:
    memory = TableMemory()
    first = memory.empty(SHAPE, "<i4")
    first[:] = 7
    where = address(first)
    del first
    assert address(memory.empty(SHAPE, "<i4")) == where


def test_what_a_view_still_shows_does_not() -> None:
    memory = TableMemory()
    first = memory.empty(SHAPE, "<i4")
    first[:] = 7
    view = first[5:6].T
    where = address(first)
    del first
    gc.collect()
    second = memory.empty(SHAPE, "<i4")
    second[:] = 8
    assert address(second) != where
    assert (view == 7).all()


def test_tables_outlive_their_client() -> None:
    memory = TableMemory()
    table = memory.empty(SHAPE, "<i4")
    table[:] = 7
    del memory
    gc.collect()
    assert (table == 7).all()


def test_no_more_is_kept_than_one_table() -> None:
    memory = TableMemory()
    several = [memory.empty(SHAPE, "<i4") for _ in range(5)]
    assert len({address(each) for each in several}) == 5
    del several
    assert len(memory._spare) == 2
    memory.empty((1000, 800), "<i4")
    assert len(memory._spare) == 1, "tables of another size are no longer read"


def test_the_very_small_and_the_very_large_are_not_kept() -> None:
    memory = TableMemory()
    for shape in ((3, 4), (MOST_BYTES // 4, 1)):
        memory.empty(shape, "<f4")
    assert not memory._spare
