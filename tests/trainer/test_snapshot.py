"""Rows as they were, whatever training does meanwhile."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nearkin_trainer.classes import ClassEmbeddings, Host, Rows, RowSGD, Snapshot

ROWS = 11


@settings(max_examples=80, deadline=None)
@given(
    block=st.integers(1, ROWS + 1),
    changes=st.lists(st.sets(st.integers(0, ROWS + 3)).map(sorted), max_size=20),
    first=st.integers(0, 3),
)
def test_blocks_are_the_rows_as_they_were(block: int, changes: list[list[int]], first: int) -> None:
    """Rows change before each block and after the last; others of the same table do too."""
    table = torch.randn(ROWS + 4, 2, 1, 1)
    before = table[first : first + ROWS].clone()
    snapshot = Snapshot(table[first : first + ROWS], first)
    remaining, found = iter(changes), list[torch.Tensor]()

    def change() -> None:
        for rows in [next(remaining, []), next(remaining, [])]:
            ids = torch.tensor(rows, dtype=torch.int64)
            snapshot.keep(ids)
            table[ids] += 1

    change()
    for start, rows in snapshot.blocks(block * 8):
        assert start == sum(len(part) for part in found)
        found.append(rows.clone())
        change()
    assert torch.equal(torch.cat(found), before)
    snapshot.close()
    assert snapshot.rows_aside == 0


@pytest.mark.parametrize("host", [None, Host(5)], ids=["device", "host"])
@pytest.mark.parametrize("keeping", ["learnable", "memory"])
def test_steps_do_not_change_it(keeping: str, host: Host | None) -> None:
    torch.manual_seed(0)
    table = ClassEmbeddings(40, 2, 1, 1, keeping, host=host)  # type: ignore[arg-type]
    optimiser = table.optimiser("sgd")
    assert keeping == "memory" or host or isinstance(optimiser, RowSGD)

    def step() -> None:
        rows = Rows(torch.randperm(40)[:7].sort()[0], torch.randn(7, 2, 1, 1))
        if keeping == "memory":
            table.remember(rows, momentum=0.5)
        else:
            table.update(optimiser, rows, rate=0.1)

    step()
    before = table.rows(slice(3, 40)).clone()
    snapshot = table.snapshot(slice(3, 40))
    step()
    assert snapshot.rows_aside <= 7  # and not the whole table
    found = []
    for _, rows in snapshot.blocks(9 * 8):
        found.append(rows.clone())
        step()
    assert torch.equal(torch.cat(found), before)
    assert not torch.equal(table.rows(slice(3, 40)), before)


def test_training_and_reading_at_the_same_time() -> None:
    table = torch.randn(20_000, 16, 1, 1)
    before = table.clone()
    snapshot = Snapshot(table)
    found: list[torch.Tensor] = []

    def read() -> None:
        found.extend(rows.clone() for _, rows in snapshot.blocks(16 * 1024))

    reader = threading.Thread(target=read)
    reader.start()
    while reader.is_alive():
        ids = torch.unique(torch.randint(0, 20_000, (50,)))
        snapshot.keep(ids)
        table[ids] += 1
    reader.join()
    assert torch.equal(torch.cat(found), before)
