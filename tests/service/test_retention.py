"""What stays: the last n, every m-th, what is pinned, and what someone is reading just now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_client import NeighbourClient
from nearkin_client.errors import NotFound
from nearkin_service.errors import FailedPreconditionError

from tests.service.conftest import Caller, Service, brute_force, eventually, random_rows, refusal

Start = Callable[..., Service]
ROWS = random_rows(40, 8)


def numbers(caller: Caller) -> list[int]:
    return [g.generation for g in caller.generations()]


def test_every_mth_stays(caller: Caller) -> None:
    keep = pb.Retention(keep_embeddings=1, keep_tables=2, keep_every=3)
    for epoch in range(8):
        caller.push(ROWS + epoch, epoch, retention=keep)
    eventually(lambda: numbers(caller), lambda found: found == [8, 7, 6, 3])
    states = {g.generation: g.embeddings for g in caller.generations()}
    assert states[7] == pb.EMBEDDINGS_STATE_DROPPED
    assert states[3] != pb.EMBEDDINGS_STATE_DROPPED
    assert caller.nearest([0], generation=3).rows[0].ids == caller.table(generation=3).ids[0].tolist()


def test_a_pinned_generation_stays_across_restarts_until_it_is_unpinned(start_service: Start) -> None:
    keep = pb.Retention(keep_embeddings=1, keep_tables=1)
    first = start_service()
    caller = first.caller()
    caller.push(ROWS, 0)
    with NeighbourClient(first.server.addresses[0], run="run") as client:
        assert client.pin().pinned
        assert client.generation(1).pinned
        with pytest.raises(NotFound):
            client.pin(9)
    caller.push(ROWS + 1, 1, retention=keep)
    first.stop()
    second = start_service()
    caller = second.caller()
    caller.push(ROWS + 2, 2, retention=keep)
    eventually(lambda: numbers(caller), lambda found: found == [3, 1])
    assert caller.generation(1).pinned
    caller.nearest([0], generation=1)
    caller.stub.PinGeneration(pb.PinGenerationRequest(run="run", generation=1, unpin=True))
    assert numbers(caller) == [3, 1]
    caller.push(ROWS + 3, 3, retention=keep)
    eventually(lambda: numbers(caller), lambda found: found == [4])


def test_embeddings_that_retention_takes_away_are_not_called_lost(start_service: Start) -> None:
    """Whoever looks them through just then finds files missing, which is no damage."""
    service = start_service()
    service.caller().push(ROWS, 0)
    service.caller().table(min_epoch=0)
    eventually(  # the service flushes and drops on one thread; here they could meet
        lambda: service.caller().generation(1).embeddings, lambda state: state == pb.EMBEDDINGS_STATE_KEPT
    )
    directory = service.server.core.directory
    generation = service.server.core.catalogue.run("run").generation(1)
    directory.drop_embeddings(generation)
    with pytest.raises(FailedPreconditionError, match="just dropped"):
        directory.verify_rows(generation)
    service.stop()
    assert start_service().caller().generation(1).embeddings == pb.EMBEDDINGS_STATE_DROPPED


def test_what_is_being_read_is_read_to_its_end(caller: Caller) -> None:
    """A slow reader holds the first block; meanwhile its generation is removed."""
    rows = random_rows(3000, 4)
    caller.push(rows, 0, k=2500)
    stream: Any = caller.stub.ReadTable(pb.ReadTableRequest(run="run", generation=1))
    header = next(stream).header
    caller.push(rows[:50].copy(), 1, retention=pb.Retention(keep_embeddings=1, keep_tables=1))
    eventually(lambda: numbers(caller), lambda found: found == [2])
    assert refusal(lambda: caller.table(generation=1)).code() is grpc.StatusCode.NOT_FOUND
    payload = b"".join(message.block.payload for message in stream)
    ids = np.frombuffer(payload, np.int32).reshape(header.row_count, 2500)
    np.testing.assert_array_equal(ids[:, :5], brute_force(rows, 5))
