"""The digest of a whole push: from the checksums of its messages, compared with what the service has."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st
from nearkin.v1 import bulk, checksums
from nearkin.v1 import neighbours_pb2 as pb
from nearkin.v1.checksums import followed_by, of_zeros
from nearkin_client import DataLoss, NeighbourClient, lane
from nearkin_client.arrays import as_rows
from nearkin_client.digest import Digest
from nearkin_client.local import LocalService
from nearkin_client.wire import Wire

generator = np.random.default_rng(9)
ROWS = generator.standard_normal((64, 1 << 16)).astype(np.float32)


@pytest.mark.parametrize("nbytes", [0, 1, 63, 64, 255, 256, 257, 1023, 4096 + 7, (1 << 20) + 5])
@pytest.mark.parametrize("offset", [0, 1, 16])
def test_a_checksum_is_that_of_another_library(nbytes: int, offset: int) -> None:
    data = ROWS.reshape(-1).view(np.uint8).data[offset : offset + nbytes]
    assert checksums.crc32c(data) == crc32c(data)
    assert checksums.crc32c(data, 0xDEAD_BEEF) == crc32c(data, 0xDEAD_BEEF)
    assert checksums.crc32c(bytes(data)) == checksums.crc32c(bytearray(data)) == crc32c(data)


@given(first=st.binary(), second=st.binary())
def test_checksums_are_joined_without_their_bytes(first: bytes, second: bytes) -> None:
    joined = followed_by(crc32c(first), crc32c(second), len(second))
    assert joined == crc32c(first + second)


@given(count=st.integers(0, 5000))
def test_the_checksum_of_zeros(count: int) -> None:
    assert of_zeros(count) == crc32c(bytes(count))


@given(cuts=st.sets(st.integers(0, 19)), lost=st.sets(st.integers(0, 19)), extra=st.integers(0, 19))
def test_a_digest_is_whole_whatever_the_messages_were(cuts: set[int], lost: set[int], extra: int) -> None:
    """Interruptions leave gaps, and messages that were cut anew."""
    array = np.arange(60, dtype=np.float32).reshape(20, 3)
    digest = Digest(as_rows("embeddings", array, None))
    starts = sorted(cuts | {0})
    for start, stop in zip(starts, [*starts[1:], 20], strict=True):
        if start not in lost:
            digest.note(start, stop, crc32c(array[start:stop].data.cast("B")))
    digest.note(extra, extra + 1, crc32c(array[extra : extra + 1].data.cast("B")))
    assert digest.whole(4) == crc32c(array.data.cast("B"))


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Those that go with CommitPush."""
    seen: list[int] = []
    ask: Any = Wire.ask

    def spying(self: Wire, method: Any, request: Any, **options: Any) -> Any:
        if isinstance(request, pb.CommitPushRequest) and request.HasField("rows_crc32c"):
            seen.append(request.rows_crc32c)
        return ask(self, method, request, **options)

    monkeypatch.setattr(Wire, "ask", spying)
    return seen


@pytest.mark.parametrize("shared", [True, False])
def test_every_push_ends_with_the_digest_of_its_rows(
    nearkin_server: LocalService, digests: list[int], shared: bool
) -> None:
    run = f"digest-{shared}".lower()
    with NeighbourClient(nearkin_server.address, run=run, shared_memory=shared) as client:
        for _ in range(2):  # the second time it is published, and compared
            client.push(ROWS, epoch=0, k=4)
            client.table(epoch=0, timeout=60)
        client.push(ROWS[:32], epoch=1, num_classes=64, k=4)
        client.push(ROWS[32:], epoch=1, row_start=32, num_classes=64, k=4)
        client.table(epoch=1, timeout=60)
        client.push(ROWS, epoch=2, k=4, absent=[3])
        client.table(epoch=2, timeout=60)
    whole, first, second = (crc32c(rows.data.cast("B")) for rows in (ROWS, ROWS[:32], ROWS[32:]))
    assert digests == [whole, whole, first, second, whole]


@pytest.fixture
def misplacing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit flips in the header of two messages: no checksum of theirs notices, all rows are there."""
    send = lane.send_rows

    def sent_wrongly(connection: Any, message: bulk.WriteRows, *rest: Any) -> int:
        rows = message.payload.nbytes // ROWS[0].nbytes
        return send(connection, replace(message, row_start=message.row_start ^ rows), *rest)

    monkeypatch.setattr(lane, "send_rows", sent_wrongly)


@pytest.mark.usefixtures("misplacing")
@pytest.mark.parametrize("cuts", [[0, 64], [0, 32, 64], [0, 48, 64]])
def test_rows_that_went_to_each_others_places_are_data_loss(
    nearkin_server: LocalService, cuts: list[int]
) -> None:
    run = f"misplaced-{len(cuts)}-{cuts[1]}"
    with NeighbourClient(nearkin_server.address, run=run, shared_memory=False) as client:
        for start, stop in pairwise(cuts):
            with pytest.raises(DataLoss, match="rows_crc32c"):
                client.push(ROWS[start:stop], epoch=0, row_start=start, num_classes=64, k=4)
        assert client.generations() == ()
        assert client.run_info().pushes == ()


def test_rows_that_are_not_what_was_sent_are_data_loss(
    nearkin: NeighbourClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("nearkin_client.digest.followed_by", lambda *_: 1)
        with pytest.raises(DataLoss, match="rows_crc32c"):
            nearkin.push(ROWS, epoch=0, k=4)
    assert nearkin.generations() == ()
    nearkin.push(ROWS, epoch=0, k=4)
    nearkin.table(epoch=0, timeout=60)
