"""The exchange with a real service: pushed rows come back as a table."""

import logging

import numpy as np
import pytest
import torch
from nearkin_client import NeighbourClient
from nearkin_trainer.classes import ClassEmbeddings
from nearkin_trainer.distributed import World
from nearkin_trainer.neighbours import NeighbourConfig, Neighbours


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


def test_a_run_that_is_not_there_needs_no_rewinding(nearkin: NeighbourClient) -> None:
    neighbours = Neighbours(World(), nearkin, NeighbourConfig(), 6)
    neighbours.refuse_leftovers()
    neighbours.rewind(0)
