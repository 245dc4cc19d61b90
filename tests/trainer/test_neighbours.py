"""The exchange with a real service: pushed rows come back as a table."""

import itertools
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from nearkin_client import NeighbourClient, NeighbourTable, Push, lane
from nearkin_client.errors import AlreadyExists, DataLoss, InvalidArgument, NotFound
from nearkin_client.local import LocalService
from nearkin_trainer.classes import ClassEmbeddings, Rows
from nearkin_trainer.distributed import World
from nearkin_trainer.neighbours import NeighbourConfig, Neighbours

_numbers = itertools.count()


class Gated(NeighbourClient):
    """Its pushes and tables are as slow as a test wants: they wait until the gate is open."""

    def __init__(self, address: str) -> None:
        super().__init__(address, run=f"gated-{next(_numbers)}")
        self.pushes, self.tables = threading.Event(), threading.Event()
        self.pushes.set()
        self.tables.set()

    def push(self, *arguments: Any, **more: Any) -> Push:
        assert self.pushes.wait(60)
        return super().push(*arguments, **more)

    def table(self, **arguments: Any) -> NeighbourTable:
        assert self.tables.wait(60)
        return super().table(**arguments)


@pytest.fixture
def gated(nearkin_server: LocalService) -> Iterator[Gated]:
    with Gated(nearkin_server.address) as client:
        yield client


def _train(table: ClassEmbeddings) -> None:
    """Changes every row, as steps do."""
    table.remember(Rows(torch.arange(len(table.weight)), torch.randn_like(table.weight)), momentum=0.0)


def _nearest(table: ClassEmbeddings, k: int) -> np.ndarray:
    rows = torch.nn.functional.normalize(table.weight.detach().flatten(1).double(), dim=1)
    similarity = rows @ rows.T
    similarity.fill_diagonal_(-9)
    return similarity.topk(k, 1).indices.numpy()


def test_a_table_of_the_pushed_rows(nearkin: NeighbourClient) -> None:
    torch.manual_seed(0)
    table = ClassEmbeddings(20, 4, 2, 2)
    neighbours = Neighbours(World(), nearkin, NeighbourConfig(k=5), 20)
    assert (neighbours.refresh(0, table) == _nearest(table, 5)).all()
    assert neighbours.generation == 1
    assert neighbours.stall_seconds > 0
    with torch.no_grad():
        table.weight.normal_()
    assert (neighbours.refresh(1, table) == _nearest(table, 5)).all()
    assert neighbours.generation == 2


def test_a_table_by_location_wise_score(nearkin: NeighbourClient) -> None:
    table = ClassEmbeddings(12, 3, 2, 2)
    torch.nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(1))
    ids = Neighbours(World(), nearkin, NeighbourConfig(k=11, key="qaconv"), 12).refresh(0, table)
    maps = torch.nn.functional.normalize(table.weight.detach().double().flatten(2), dim=1)
    similar = torch.einsum("pcr,ncs->pnrs", maps, maps)
    scores = (similar.amax(3).mean(2) + similar.amax(2).mean(2)).fill_diagonal_(-torch.inf)
    np.testing.assert_array_equal(ids, scores.argsort(dim=1, descending=True)[:, :11])


def test_k_is_cut_down_and_said(nearkin: NeighbourClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "nearkin"):
        neighbours = Neighbours(World(), nearkin, NeighbourConfig(k=50), 8)
    assert neighbours.k == 7
    assert "using k=7" in caplog.text
    assert neighbours.refresh(0, ClassEmbeddings(8, 4, 2, 2)).shape == (8, 7)


def test_classes_without_an_embedding_are_nobodys_neighbour(nearkin: NeighbourClient) -> None:
    table = ClassEmbeddings(6, 4, 1, 1, "memory")
    table.seen[:] = torch.tensor([True, True, False, True, True, False])
    ids = Neighbours(World(), nearkin, NeighbourConfig(k=2), 6).refresh(0, table)
    assert (ids[[2, 5]] == -1).all()
    assert not np.isin(ids, [2, 5]).any()


def test_rewinding_makes_room_for_other_rows(nearkin: NeighbourClient) -> None:
    neighbours = Neighbours(World(), nearkin, NeighbourConfig(k=2), 6)
    first = ClassEmbeddings(6, 4, 1, 1)
    for epoch in range(3):
        neighbours.refresh(epoch, first)
    nearkin.push(first.weight[:3], epoch=3, k=2, num_classes=6)  # interrupted: the other half never came
    with pytest.raises(ValueError, match="already has 3 generations"):
        neighbours.refuse_leftovers()
    neighbours.rewind(1)
    assert [g.epoch for g in nearkin.generations()] == [0]
    second = ClassEmbeddings(6, 4, 1, 1)
    for epoch in (1, 2, 3):
        assert (neighbours.refresh(epoch, second) == _nearest(second, 2)).all()


def test_a_push_under_way_is_not_dropped_unasked(nearkin: NeighbourClient) -> None:
    """Another job of that name may have just begun; only who says so replaces what there is."""
    push = nearkin.push(torch.randn(3, 4), epoch=0, k=2, num_classes=6)
    neighbours = Neighbours(World(), nearkin, NeighbourConfig(k=2), 6)
    with pytest.raises(ValueError, match=r"a push of epoch 0, perhaps another job's, .* --run-name"):
        neighbours.refuse_leftovers()
    assert nearkin.push_state(push).state == "open"
    neighbours.rewind(0)
    assert nearkin.push_state(push).state == "aborted"


def test_another_job_under_the_same_name_is_guessed(nearkin: NeighbourClient) -> None:
    """Its rows, its arguments or its later epoch are in the way; nothing of it is trained with."""
    table = ClassEmbeddings(6, 4, 1, 1)
    torch.nn.init.normal_(table.weight)
    with Neighbours(World(), nearkin, NeighbourConfig(k=2), 6) as neighbours:
        for epoch, rows, k in ((0, torch.randn(6, 4, 1, 1), 2), (1, table.weight, 3)):
            nearkin.push(rows, epoch=epoch, k=k)
            nearkin.table(epoch=epoch)
            with pytest.raises(AlreadyExists, match=rf"^epoch {epoch}: .*Does another job use this run\?"):
                neighbours.refresh(epoch, table)
        nearkin.push(table.weight, epoch=9, k=2)
        nearkin.table(epoch=9)
        with pytest.raises(NotFound, match=r"no table of our epoch 5, .* one of epoch 9: .* another job"):
            neighbours._ask(5, None)


def test_a_run_that_is_not_there_needs_no_rewinding(nearkin: NeighbourClient) -> None:
    neighbours = Neighbours(World(), nearkin, NeighbourConfig(), 6)
    neighbours.refuse_leftovers()
    neighbours.rewind(0)


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_in_the_background_a_table_is_exactly_so_old(nearkin: NeighbourClient, staleness: int) -> None:
    embeddings, right = ClassEmbeddings(12, 4, 1, 1), []
    with Neighbours(World(), nearkin, NeighbourConfig(k=3), 12, staleness) as neighbours:
        for epoch in range(6):
            right.append(_nearest(embeddings, 3))
            table = neighbours.refresh(epoch, embeddings)
            _train(embeddings)
            neighbours.settle()
            wanted = max(0, epoch - staleness)
            assert neighbours.table_epoch == wanted
            assert (table == right[wanted]).all()
        neighbours.publish(6, embeddings)
        assert (nearkin.table(epoch=6).ids == _nearest(embeddings, 3)).all()
    assert [g.epoch for g in nearkin.generations()] == [6, 5, 4, 3, 2, 1, 0]


def test_training_goes_on_before_push_and_table_and_waits_at_the_bound(gated: Gated) -> None:
    embeddings = ClassEmbeddings(12, 4, 1, 1)
    with Neighbours(World(), gated, NeighbourConfig(k=3), 12, staleness=1) as neighbours:
        first = neighbours.refresh(0, embeddings)
        _train(embeddings)
        right = _nearest(embeddings, 3)
        gated.pushes.clear()
        gated.tables.clear()
        assert neighbours.refresh(1, embeddings) is first  # although nothing can be pushed
        _train(embeddings)
        gated.pushes.set()
        neighbours.settle()  # although no table can be had
        opening = threading.Timer(0.2, gated.tables.set)
        opening.start()
        assert (neighbours.refresh(2, embeddings) == right).all()  # the rows as they were at epoch 1
        assert gated.tables.is_set()  # it has waited
        opening.join()


def test_a_newer_table_is_not_taken(gated: Gated) -> None:
    embeddings, right = ClassEmbeddings(12, 4, 1, 1), []
    with Neighbours(World(), gated, NeighbourConfig(k=3), 12, staleness=2) as neighbours:
        for epoch in range(3):
            right.append(_nearest(embeddings, 3))
            neighbours.refresh(epoch, embeddings)
            gated.tables.clear()
            _train(embeddings)
        neighbours.settle()
        assert NeighbourClient.table(gated, epoch=2, timeout=60).epoch == 2
        gated.tables.set()
        assert (neighbours.refresh(3, embeddings) == right[1]).all()


def test_going_on_with_the_tables_that_the_service_has(
    nearkin: NeighbourClient, caplog: pytest.LogCaptureFixture
) -> None:
    embeddings, right = ClassEmbeddings(12, 4, 1, 1), []
    with Neighbours(World(), nearkin, NeighbourConfig(k=3), 12, staleness=2) as neighbours:
        for epoch in range(4):
            right.append(_nearest(embeddings, 3))
            neighbours.refresh(epoch, embeddings)
            _train(embeddings)
        neighbours.settle()
    with Neighbours(World(), nearkin, NeighbourConfig(k=3), 12, staleness=2) as neighbours:
        neighbours.rewind(3)
        assert (neighbours.refresh(3, embeddings) == right[1]).all()
        assert (neighbours.refresh(4, embeddings) == right[2]).all()
        neighbours.settle()
    nearkin.table(epoch=4)
    nearkin.delete_generation(next(g.generation for g in nearkin.generations() if g.epoch == 3))
    with Neighbours(World(), nearkin, NeighbourConfig(k=3), 12, staleness=2) as neighbours:
        neighbours.rewind(5)
        assert "no table of every epoch from 3 to 4 any more: epoch 5 waits for its own" in caplog.text
        for epoch in (5, 6, 7):
            right = [_nearest(embeddings, 3), *right]
            assert (neighbours.refresh(epoch, embeddings) == right[epoch - 5]).all()
            assert neighbours.table_epoch == 5


def test_tables_that_another_job_has_pushed_meanwhile_are_not_ours(
    nearkin: NeighbourClient, caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint knows its own pushes; the other job had the same epochs."""
    ours, theirs = ClassEmbeddings(12, 4, 1, 1), ClassEmbeddings(12, 4, 1, 1)
    with Neighbours(World(), nearkin, NeighbourConfig(k=3), 12, staleness=1) as neighbours:
        for epoch in range(2):
            neighbours.refresh(epoch, ours)
        neighbours.settle()
        pushes = neighbours.pushes
    with Neighbours(World(), nearkin, NeighbourConfig(k=3), 12, staleness=1) as neighbours:
        neighbours.rewind(0)
        for epoch in range(2):
            neighbours.refresh(epoch, theirs)
        neighbours.settle()
        neighbours.pushes = pushes
        with pytest.raises(NotFound, match=r"no table of our epoch 1, .* ours was removed, or another"):
            neighbours._ask(1, None)
    with Neighbours(World(), nearkin, NeighbourConfig(k=3), 12, staleness=1) as neighbours:
        neighbours.pushes = pushes
        neighbours.rewind(2)
        assert "epoch 2 waits for its own" in caplog.text
        assert (neighbours.refresh(2, ours) == _nearest(ours, 3)).all()


def test_giving_up_does_not_wait_for_a_table_that_never_comes(nearkin_server: LocalService) -> None:
    embeddings = ClassEmbeddings(12, 4, 1, 1)
    with Gated(nearkin_server.address) as client:
        with Neighbours(World(), client, NeighbourConfig(k=3), 12, staleness=1) as neighbours:
            neighbours.refresh(0, embeddings)
            first = client.push(embeddings.rows(slice(0, 12)), epoch=0, k=3)  # the same again
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(client, "push", lambda *_, **__: first)
                neighbours.refresh(1, embeddings)
                neighbours.settle()
        waiting = [t for t in threading.enumerate() if t.name.startswith("nearkin-table")]
    for thread in waiting:
        thread.join(30)
        assert not thread.is_alive()


def test_what_fails_in_the_background_is_raised(nearkin: NeighbourClient) -> None:
    embeddings = ClassEmbeddings(12, 4, 1, 1)
    with Neighbours(World(), nearkin, NeighbourConfig(k=3), 12, staleness=1) as neighbours:
        neighbours.refresh(0, embeddings)
        with torch.no_grad():
            embeddings.weight[7] = torch.nan
        neighbours.refresh(1, embeddings)
        with pytest.raises(InvalidArgument, match="7"):
            neighbours.settle()


def test_rows_that_went_astray_reach_no_table(
    nearkin_server: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks pushed behind training carry a digest too: here a bit flips in each message's header."""
    send = lane.send_rows

    def sent_wrongly(connection: Any, message: Any, *rest: Any) -> int:
        rows = message.payload.nbytes // embeddings.weight[0].nbytes
        return send(connection, replace(message, row_start=message.row_start ^ rows), *rest)

    monkeypatch.setattr(lane, "send_rows", sent_wrongly)
    monkeypatch.setattr("nearkin_trainer.neighbours.BLOCK_BYTES", 4 << 20)
    embeddings = ClassEmbeddings(64, 1 << 16, 1, 1)
    with (
        NeighbourClient(nearkin_server.address, run="astray", shared_memory=False) as client,
        Neighbours(World(), client, NeighbourConfig(k=3), 64, staleness=1) as neighbours,
    ):
        neighbours._begin(0, embeddings, training=True)
        with pytest.raises(DataLoss, match="rows_crc32c"):
            neighbours.settle()
        assert client.generations() == ()
