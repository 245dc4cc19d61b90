"""Only the rows that changed are sent; the service takes the others from the generation before."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from nearkin.v1 import bulk
from nearkin_client import InvalidArgument, NeighbourClient
from nearkin_client.local import LocalService

from tests.client.oracle import assert_is_table, similarities

generator = np.random.default_rng(3)


def check(client: NeighbourClient, epoch: int, rows: Any) -> int:
    table = client.table(epoch=epoch, timeout=60)
    assert table.scores is not None
    assert_is_table(table.ids, table.scores, similarities(rows))
    return table.generation


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("changed", [[], [0], [59], [3, 4, 5, 40, 17], list(range(60))])
def test_the_table_is_that_of_all_rows(
    nearkin_server: LocalService, changed: list[int], shared: bool
) -> None:
    rows = generator.standard_normal((60, 6)).astype(np.float32)
    run = f"changed-{len(changed)}-{sum(changed)}-{shared}".lower()
    with NeighbourClient(nearkin_server.address, run=run, shared_memory=shared) as client:
        client.push(rows, epoch=0, k=5)
        base = check(client, 0, rows)
        rows[changed] += 1
        pushed = client.push(rows, epoch=1, k=5, changed_rows=changed, base_generation=base)
        assert pushed.epoch == 1
        check(client, 1, rows)
        assert client.nearest(classes=[3], k=5).ids.tolist() == [client.table(epoch=1).ids[3].tolist()]


def test_rows_not_named_are_the_bases_own(nearkin: NeighbourClient) -> None:
    rows = generator.standard_normal((60, 6)).astype(np.float32)
    nearkin.push(rows, epoch=0, k=5)
    base = check(nearkin, 0, rows)
    scrambled = generator.standard_normal((60, 6)).astype(np.float32)
    scrambled[7] = rows[7] + 1
    nearkin.push(scrambled, epoch=1, k=5, changed_rows=[7], base_generation=base)
    rows[7] += 1
    check(nearkin, 1, rows)


def test_ranks_send_their_changes_and_one_commits(nearkin: NeighbourClient) -> None:
    rows = generator.standard_normal((60, 6)).astype(np.float32)
    nearkin.push(rows, epoch=0, k=5)
    base = check(nearkin, 0, rows)
    rows[[2, 50]] += 1
    options: Any = {"epoch": 1, "k": 5, "num_classes": 60, "commit": False, "base_generation": base}
    nearkin.push(rows[:30], changed_rows=[2], **options)
    push = nearkin.push(rows[30:], row_start=30, changed_rows=[50], **options)
    nearkin.commit(push)
    check(nearkin, 1, rows)


@pytest.mark.parametrize("big", [False, True], ids=["gRPC", "bulk lane"])
def test_a_message_that_was_damaged_brings_no_row_to_another_class(
    nearkin_server: LocalService, monkeypatch: pytest.MonkeyPatch, big: bool
) -> None:
    """The rows that stay are the base's own, so none would be missed."""
    rows = generator.standard_normal((60, 1 << 17 if big else 6)).astype(np.float32)
    head = bulk.write_rows_head
    damaged: list[int] = []

    def damaging(message: bulk.WriteRows) -> bytes:
        data = bytearray(head(message))
        if not damaged:
            at = data.index(b"\x10\x1e")  # row_start 30
            data[at + 1] ^= 1
            damaged.append(message.row_start)
        return bytes(data)

    run = f"damaged-{big}".lower()
    with NeighbourClient(nearkin_server.address, run=run, shared_memory=False) as client:
        client.push(rows, epoch=0, k=5)
        base = check(client, 0, rows)
        rows[30:34] += 1
        monkeypatch.setattr(bulk, "write_rows_head", damaging)
        client.push(rows, epoch=1, k=5, changed_rows=[30, 31, 32, 33], base_generation=base)
        assert damaged == [30]
        check(client, 1, rows)


def test_a_class_that_was_absent_stays_absent_until_it_is_sent(nearkin: NeighbourClient) -> None:
    rows = generator.standard_normal((60, 6)).astype(np.float32)
    nearkin.push(rows, epoch=0, k=5, absent=[8, 9])
    base = nearkin.table(epoch=0, timeout=60).generation
    nearkin.push(rows, epoch=1, k=5, changed_rows=[8], base_generation=base, absent=[20])
    ids = nearkin.table(epoch=1, timeout=60).ids
    assert [n for n in range(60) if (ids[n] == -1).all()] == [9, 20]
    assert not set(ids.ravel().tolist()) & {9, 20}


def test_a_base_that_is_gone_means_a_whole_push(
    nearkin: NeighbourClient, caplog: pytest.LogCaptureFixture
) -> None:
    rows = generator.standard_normal((60, 6)).astype(np.float32)
    for epoch in range(4):
        nearkin.push(rows + epoch, epoch=epoch, k=5)
        generation = check(nearkin, epoch, rows + epoch)
    assert generation == 4
    caplog.set_level(logging.WARNING, "nearkin.client")
    for epoch, base in ((4, 1), (5, 99)):
        rows = rows + 1
        nearkin.push(rows, epoch=epoch, k=5, changed_rows=[1], base_generation=base)
        check(nearkin, epoch, rows)
    assert caplog.text.count("pushing all 60 rows") == 2


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"changed_rows": [1]}, "base_generation"),
        ({"changed_rows": [60], "base_generation": 1}, "changed_rows"),
        ({"changed_rows": [-1], "base_generation": 1}, "changed_rows"),
        ({"changed_rows": [0.5], "base_generation": 1}, "changed_rows"),
    ],
)
def test_what_is_wrong_is_named(nearkin: NeighbourClient, arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        nearkin.push(np.ones((60, 6), np.float32), epoch=0, k=5, **arguments)
    assert caught.value.field == field


def test_a_base_of_another_kind_is_refused(nearkin: NeighbourClient) -> None:
    rows = generator.standard_normal((60, 6)).astype(np.float32)
    nearkin.push(rows, epoch=0, k=5)
    base = check(nearkin, 0, rows)
    with pytest.raises(InvalidArgument, match="num_classes"):
        nearkin.push(rows[:50], epoch=1, k=5, changed_rows=[1], base_generation=base)


def test_a_base_without_changes_is_refused_and_nothing_is_begun(nearkin: NeighbourClient) -> None:
    rows = generator.standard_normal((20, 6)).astype(np.float32)
    nearkin.push(rows, epoch=0, k=5)
    base = check(nearkin, 0, rows)
    with pytest.raises(InvalidArgument, match="changed_rows") as refused:
        nearkin.push(rows, epoch=1, k=5, base_generation=base)
    assert refused.value.field == "base_generation"
    assert [push.epoch for push in nearkin.run_info().pushes] == []
