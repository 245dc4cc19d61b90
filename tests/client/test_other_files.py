"""Where the service's paths lead to other files: an overlay, a container with a directory of that name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nearkin_client import DataLoss, FailedPrecondition, NeighbourClient, shared
from nearkin_client.local import LocalService

from tests.client.oracle import assert_is_table, similarities
from tests.client.restarts import service_with_port

ROWS = np.random.default_rng(5).standard_normal((40, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def service() -> Iterator[LocalService]:
    with service_with_port() as started:
        yield started


@pytest.fixture(params=["unix", "tcp"])
def address(request: pytest.FixtureRequest, service: LocalService) -> str:
    return service._listen[["unix", "tcp"].index(request.param)]


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="nearkin")
    return caplog


def while_elsewhere(path: Path, other: bytes, work: Callable[[], Any]) -> Any:
    """What the work finds at the path is another file; the service has its own open, or back in the end."""
    aside = path.with_name("aside")
    path.rename(aside)
    try:
        path.write_bytes(other)
        return work()
    finally:
        aside.rename(path)


@pytest.fixture
def rows_in_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    lent = shared.lent

    def in_a_copy(begun: Any, *rest: Any) -> Any:
        path = Path(begun.lent_rows.path)
        if not begun.HasField("lent_rows"):
            return lent(begun, *rest)
        return while_elsewhere(path, path.read_bytes(), lambda: lent(begun, *rest))

    monkeypatch.setattr("nearkin_client.push.lent", in_a_copy)


@pytest.fixture
def tables_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    map_table = shared.map_table

    def another(path: str, shape: tuple[int, int], dtype: str) -> Any:
        zeros = bytes(4 * shape[0] * shape[1])
        return while_elsewhere(Path(path), zeros, lambda: map_table(path, shape, dtype))

    monkeypatch.setattr("nearkin_client.tables.map_table", another)


def push_and_read(address: str, run: str) -> None:
    """All of it right, whatever ways there are."""
    with NeighbourClient(address, run=run) as client:
        client.push(ROWS, epoch=0, k=5)
        table = client.table(epoch=0, timeout=60)
    assert table.scores is not None
    assert_is_table(table.ids, table.scores, similarities(ROWS))


@pytest.mark.usefixtures("rows_in_a_copy")
def test_rows_are_not_written_into_another_file(
    address: str, request: pytest.FixtureRequest, log: pytest.LogCaptureFixture
) -> None:
    run = f"rows-{request.node.callspec.id}"
    push_and_read(address, run)
    assert "rows go through the connection" in log.text
    assert "another file" in log.text
    with (
        NeighbourClient(address, run=run, shared_memory=True) as client,
        pytest.raises(FailedPrecondition, match=r'another file.*"auto"'),
    ):
        client.push(ROWS, epoch=1, k=5)


@pytest.mark.usefixtures("tables_of_another")
def test_a_table_in_another_file_is_read_through_the_connection(
    address: str, request: pytest.FixtureRequest, log: pytest.LogCaptureFixture
) -> None:
    run = f"tables-{request.node.callspec.id}"
    push_and_read(address, run)
    assert "read through the connection" in log.text
    with (
        NeighbourClient(address, run=run, shared_memory=True) as client,
        pytest.raises(DataLoss, match=r"ids.bin.*another file"),
    ):
        client.table(epoch=0)


def test_a_table_that_is_damaged_at_the_service_is_no_other_file(service: LocalService) -> None:
    with NeighbourClient(service.address, run="damaged") as client:
        client.push(ROWS, epoch=0, k=5)
        client.table(epoch=0, timeout=60)
        path = service.data_dir / "runs" / "damaged" / "generations" / "1" / "ids.bin"
        kept = path.read_bytes()
        path.write_bytes(bytes(len(kept)))
        with pytest.raises(DataLoss):
            client.table(epoch=0)
