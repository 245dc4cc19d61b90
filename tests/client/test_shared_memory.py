"""Shared memory as a training job meets it: by itself, said aloud, and never in the way."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nearkin.v1 import bulk
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_client import AlreadyExists, FailedPrecondition, InvalidArgument, NeighbourClient, NotFound
from nearkin_client.arrays import as_rows
from nearkin_client.local import LocalService
from nearkin_client.push import Sender
from nearkin_client.shared import LentRows
from nearkin_client.testing import neighbour_service
from nearkin_client.wire import Wire

from tests.client.oracle import assert_is_table, similarities
from tests.client.restarts import before_the_tenth_piece, service_with_port, start_again

generator = np.random.default_rng(5)


@pytest.fixture(scope="module")
def service() -> Iterator[LocalService]:
    with neighbour_service(listen=("127.0.0.1:0",)) as started:
        yield started


def pushes(service: LocalService, run: str) -> list[Path]:
    return list(service.data_dir.glob(f"runs/{run}/pushes/*"))


@pytest.mark.parametrize("shape", [(16,), (7, 3, 2), (1 << 19,)])
@pytest.mark.parametrize("wire_dtype", [None, "float16", "bfloat16"])
def test_a_table_through_shared_memory(
    service: LocalService, caplog: pytest.LogCaptureFixture, shape: tuple[int, ...], wire_dtype: str | None
) -> None:
    caplog.set_level(logging.INFO, "nearkin.client.shared")
    rows = generator.standard_normal((40, *shape)).astype(np.float32)
    run = f"shared-{len(shape)}-{shape[0]}-{wire_dtype}".lower()
    with NeighbourClient(service.address, run=run, shared_memory=True) as client:
        client.push(rows, epoch=0, k=4, wire_dtype=wire_dtype)  # type: ignore[arg-type]
        table = client.table(epoch=0, timeout=60)
    with NeighbourClient(service.address, run=f"{run}-plain", shared_memory=False) as client:
        client.push(rows, epoch=0, k=4, wire_dtype=wire_dtype)  # type: ignore[arg-type]
        plain = client.table(epoch=0, timeout=60)
    assert "rows go through shared memory" in caplog.text
    np.testing.assert_array_equal(table.ids, plain.ids)
    np.testing.assert_array_equal(table.scores, plain.scores)


@pytest.mark.parametrize("width", [16, 1_001, 700_001])
def test_rows_that_begin_anywhere_in_a_cache_line_arrive_as_they_are(
    service: LocalService, width: int
) -> None:
    room = generator.standard_normal(5 * width + 16, dtype=np.float32)
    for way, shared in (("shared", True), ("lane", False)):
        with NeighbourClient(service.address, run=f"anywhere-{width}-{way}", shared_memory=shared) as client:
            for shift in range(16):
                rows = room[shift : shift + 5 * width].reshape(5, width)
                push = client.push(rows, epoch=shift, k=4, commit=False)
                (stored,) = service.data_dir.glob(f"runs/*/pushes/{push.push_id}/rows.bin")
                held = stored.read_bytes()
                begins = len(held) - rows.nbytes
                assert held[begins:] == rows.tobytes()
                if shared and rows.ctypes.data % 16 == 0:
                    assert begins == rows.ctypes.data % 64
                client.abort(push)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_torch_tensors_are_copied_once_into_shared_memory(service: LocalService, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    rows = torch.randn(60, 12, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
    strided = torch.stack([rows, rows * 0], dim=1)[:, 0].requires_grad_()
    with NeighbourClient(service.address, run=f"torch-{dtype}", shared_memory=True) as client:
        client.push(strided, epoch=0, k=4)
        table = client.table(epoch=0, timeout=60)
    assert table.scores is not None
    assert_is_table(table.ids, table.scores, similarities(rows.float().numpy()))


@pytest.mark.gpu
def test_a_cuda_tensor_is_copied_from_the_device_into_shared_memory(service: LocalService) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    rows = torch.randn(60, 12, 2, 2, device="cuda")
    with NeighbourClient(service.address, run="cuda", shared_memory=True) as client:
        client.push(rows, epoch=0, k=4, wire_dtype="float16")
        table = client.table(epoch=0, timeout=60)
    assert table.scores is not None
    assert_is_table(table.ids, table.scores, similarities(rows.half().float().flatten(1).cpu().numpy()))


def test_many_ranks_share_and_send_side_by_side(service: LocalService) -> None:
    rows = generator.standard_normal((90, 33)).astype(np.float32)
    for lo, shared in ((60, True), (0, False), (30, "auto")):
        with NeighbourClient(service.address, run="ranks", shared_memory=shared) as client:  # type: ignore[arg-type]
            client.push(rows[lo : lo + 30], epoch=0, row_start=lo, num_classes=90, k=4)
    with NeighbourClient(service.address, run="ranks") as client:
        table = client.table(epoch=0, timeout=60)
        assert table.scores is not None
        assert_is_table(table.ids, table.scores, similarities(rows))
        client.push(rows, epoch=0, k=4)
        with pytest.raises(AlreadyExists):
            client.push(rows + 1, epoch=0, k=4)


def test_a_wrong_row_is_named(service: LocalService) -> None:
    rows = generator.standard_normal((40, 8)).astype(np.float32)
    rows[17, 3] = np.nan
    with (
        NeighbourClient(service.address, run="nan", shared_memory=True) as client,
        pytest.raises(InvalidArgument, match="row 17"),
    ):
        client.push(rows, epoch=0, k=4)


def test_where_it_cannot_be_had_the_rows_go_through_the_connection(
    service: LocalService, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container that sees the socket but not the data directory."""
    caplog.set_level(logging.INFO, "nearkin.client.shared")
    monkeypatch.setattr(
        "nearkin_client.shared.os.open",
        lambda path, flags: (_ for _ in ()).throw(FileNotFoundError(2, "No such file", path)),
    )
    rows = generator.standard_normal((40, 8)).astype(np.float32)
    with NeighbourClient(service.address, run="elsewhere") as client:
        client.push(rows, epoch=0, k=4)
    assert "rows go through the connection" in caplog.text
    with (
        NeighbourClient(service.address, run="elsewhere", shared_memory=True) as client,
        pytest.raises(FailedPrecondition, match="shared_memory"),
    ):
        client.push(rows, epoch=1, k=4)


@pytest.fixture
def from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that sees the socket but not the data directory."""
    ask: Any = Wire.ask

    def asked(*args: Any, **kwargs: Any) -> Any:
        reply: Any = ask(*args, **kwargs)
        if isinstance(reply, pb.BeginPushResponse) and reply.HasField("lent_rows"):
            reply.lent_rows.path = f"/nowhere{reply.lent_rows.path}"
        return reply

    monkeypatch.setattr("nearkin_client.wire.Wire.ask", asked)


@pytest.mark.usefixtures("from_elsewhere")
@pytest.mark.parametrize("width", [8, 1 << 16], ids=["grpc", "bulk lane"])
def test_who_borrows_rows_and_cannot_reach_them_sends_them_under_the_name_of_his_loan(
    service: LocalService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, width: int
) -> None:
    """So that they do not wait for their own loan to end."""
    caplog.set_level(logging.INFO, "nearkin.client")
    loans, message = set(), Sender._message

    def seen(self: Sender, piece: tuple[int, int]) -> bulk.WriteRows:
        made = message(self, piece)
        loans.add(made.loan)
        return made

    monkeypatch.setattr(Sender, "_message", seen)
    rows = generator.standard_normal((40, width)).astype(np.float32)
    with NeighbourClient(service.address, run=f"far-files-{width}") as client:
        for epoch in range(2):
            client.push(rows, epoch=epoch, k=4)
        table = client.table(epoch=1, timeout=60)
    assert caplog.text.count("rows go through the connection") == 2
    assert len(loans) == 2
    assert "" not in loans
    assert table.scores is not None
    assert_is_table(table.ids, table.scores, similarities(rows))


def test_a_loan_that_was_taken_back_is_no_error(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = generator.standard_normal((40, 8)).astype(np.float32)
    ask: Any = Wire.ask

    def with_unknown_loan(*args: Any, **kwargs: Any) -> Any:
        reply: Any = ask(*args, **kwargs)
        if isinstance(reply, pb.BeginPushResponse) and reply.HasField("lent_rows"):
            reply.lent_rows.loan = "taken-back"
        return reply

    monkeypatch.setattr("nearkin_client.wire.Wire.ask", with_unknown_loan)
    with NeighbourClient(service.address, run="taken") as client:
        client.push(rows, epoch=0, k=4)
        table = client.table(epoch=0, timeout=60)
    assert table.scores is not None
    assert_is_table(table.ids, table.scores, similarities(rows))


def test_a_disk_that_fills_up_under_the_client_is_the_services_to_refuse(
    service: LocalService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nearkin.client.push")

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nearkin_client.shared.os.pwrite", full)
    rows = generator.standard_normal((40, 8)).astype(np.float32)
    with NeighbourClient(service.address, run="full", shared_memory=True) as client:
        client.push(rows, epoch=0, k=4)
        table = client.table(epoch=0, timeout=60)
    assert "No space left on device" in caplog.text
    assert table.scores is not None
    assert_is_table(table.ids, table.scores, similarities(rows))


def test_who_still_writes_when_a_push_ends_writes_into_no_other_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C threads may be in the middle of it, and the next file gets the number of a closed one."""
    begun, go_on, pwrite = threading.Event(), threading.Event(), os.pwrite

    def halting(descriptor: int, data: memoryview, offset: int) -> int:
        begun.set()
        assert go_on.wait(60)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr("nearkin_client.shared.os.pwrite", halting)
    rows = as_rows("embeddings", generator.standard_normal((4, 8)).astype(np.float32), None)
    (tmp_path / "rows").touch()
    offer = pb.BeginPushResponse(lent_rows=pb.LentRows(path=str(tmp_path / "rows"), loan="x"))
    lent = LentRows(offer, rows, 0, os.open(tmp_path / "rows", os.O_WRONLY))
    with ThreadPoolExecutor() as threads:
        writing = threads.submit(lent.write, 0, 4)
        assert begun.wait(60)
        lent.close()
        with (tmp_path / "other").open("wb"):
            go_on.set()
            writing.result(60)
    assert (tmp_path / "other").stat().st_size == 0
    with pytest.raises(OSError, match="not written in place any more"):
        lent.write(0, 4)


def test_overlapping_rows_with_other_bytes_are_refused_whoever_comes_first(service: LocalService) -> None:
    """Both write in place; whichever is second is compared, and nothing is mixed."""
    rows = generator.standard_normal((48, 1 << 17)).astype(np.float32)
    others = rows.copy()
    others[20:30] += 1
    outcomes: dict[str, str] = {}
    together = threading.Barrier(2)

    def push(name: str, part: Any, start: int) -> None:
        with NeighbourClient(service.address, run="overlap") as client:
            together.wait()
            try:
                client.push(part, epoch=0, row_start=start, num_classes=48, k=4)
                outcomes[name] = "stored"
            except AlreadyExists:
                outcomes[name] = "refused"

    first = threading.Thread(target=push, args=("first", rows[:30], 0))
    second = threading.Thread(target=push, args=("second", others[20:], 20))
    for thread in (first, second):
        thread.start()
    for thread in (first, second):
        thread.join(60)
    assert sorted(outcomes.values()) == ["refused", "stored"]
    winner = rows if outcomes["first"] == "stored" else others
    with NeighbourClient(service.address, run="overlap") as client:
        client.push(winner, epoch=0, k=4)
        table = client.table(epoch=0, timeout=60)
    assert table.scores is not None
    assert_is_table(table.ids, table.scores, similarities(winner))


_DYING = """
import os, sys
import numpy as np
from nearkin_client import NeighbourClient, shared
real = shared.LentRows.write
def write(self, start, stop):
    if start >= 20: os._exit(9)
    return real(self, start, stop)
shared.LentRows.write = write
rows = np.random.default_rng(0).standard_normal((40, 1 << 19)).astype(np.float32)
NeighbourClient(sys.argv[1], run="dying", shared_memory=True).push(rows, epoch=0, k=4)
"""


def test_a_client_that_dies_leaves_nothing_and_another_goes_on(service: LocalService) -> None:
    died = subprocess.run([sys.executable, "-c", _DYING, service.address], check=False, capture_output=True)
    assert died.returncode == 9, died.stderr
    assert len(pushes(service, "dying")) == 1  # its own, to go on with
    rows = np.random.default_rng(0).standard_normal((40, 1 << 19)).astype(np.float32)
    with NeighbourClient(service.address, run="dying", shared_memory=True) as client:
        client.push(rows, epoch=0, k=4)
        table = client.table(epoch=0, timeout=60)
    assert table.scores is not None
    assert_is_table(table.ids, table.scores, similarities(rows))


@pytest.mark.parametrize("place", [0, 1], ids=["unix", "tcp"])
def test_a_push_goes_on_in_place_after_the_service_was_killed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    caplog.set_level(logging.INFO, "nearkin.client.push")
    rows = generator.standard_normal((64, 1 << 18)).astype(np.float32)
    before_the_tenth_piece(lambda: start_again(started), monkeypatch)
    with (
        service_with_port() as started,
        NeighbourClient(started._listen[place], run="killed", shared_memory=True) as client,
    ):
        client.push(rows, epoch=0, k=4, timeout=60)
        table = client.table(epoch=0, timeout=60)
    assert "rows were lent to us again" in caplog.text
    assert "goes through the connection" not in caplog.text
    assert table.scores is not None
    assert_is_table(table.ids, table.scores, similarities(rows))


def test_a_push_through_shared_memory_goes_on_whenever_the_service_is_killed() -> None:
    rows = generator.standard_normal((48, 1 << 20)).astype(np.float32)
    with (
        neighbour_service() as service,
        NeighbourClient(service.address, run="killed", shared_memory=True) as client,
    ):
        pushing = threading.Thread(target=lambda: client.push(rows, epoch=0, k=4, timeout=60))
        pushing.start()
        time.sleep(0.05)
        service.kill()
        service.start()
        pushing.join()
        table = client.table(epoch=0, timeout=60)
        assert pushes(service, "killed") == []
    assert table.scores is not None
    assert_is_table(table.ids, table.scores, similarities(rows))


# -------------------------------------------------------------------------------------------------- tables


def test_a_mapped_table_is_the_same_and_outlives_its_generation(service: LocalService) -> None:
    rows = generator.standard_normal((50, 8)).astype(np.float32)
    with (
        NeighbourClient(service.address, run="mapped", shared_memory=True) as client,
        NeighbourClient(service.address, run="mapped", shared_memory=False) as plain,
    ):
        client.push(rows, epoch=0, k=4)
        table = client.table(epoch=0, timeout=60)
        copied = plain.table(epoch=0)
        with pytest.raises(ValueError, match="read-only"):
            table.ids[0, 0] = 1
        client.push(rows, epoch=1, k=4)
        client.table(epoch=1, timeout=60)
        client.delete_generation(table.generation)
        assert table.ids.tobytes() == copied.ids.tobytes()
        assert table.scores is not None
        assert copied.scores is not None
        assert table.scores.tobytes() == copied.scores.tobytes()
        assert client.table(rows=(10, 20)).ids.tobytes() == copied.ids[10:20].tobytes()
        assert client.table(scores=False).scores is None


def test_a_table_whose_files_cannot_be_opened_is_read_through_the_connection(
    service: LocalService, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "nearkin.client.table")
    rows = generator.standard_normal((50, 8)).astype(np.float32)

    def gone(*_: object) -> Any:
        raise FileNotFoundError(2, "No such file or directory")

    with NeighbourClient(service.address, run="unmapped") as client:
        client.push(rows, epoch=0, k=4)
        mapped = client.table(epoch=0, timeout=60)
        monkeypatch.setattr("nearkin_client.tables.map_table", gone)
        assert client.table(epoch=0).ids.tobytes() == mapped.ids.tobytes()
    assert "through the connection" in caplog.text
    with (
        NeighbourClient(service.address, run="unmapped", shared_memory=True) as client,
        pytest.raises(FailedPrecondition, match="shared_memory"),
    ):
        client.table(epoch=0)


def test_whoever_asks_for_an_epoch_gets_a_later_table_if_its_own_is_removed_under_way(
    service: LocalService, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "nearkin.client.table")
    rows = generator.standard_normal((50, 8)).astype(np.float32)
    with NeighbourClient(service.address, run="removed") as client:
        client.push(rows, epoch=0, k=4)
        first = client.table(epoch=0, timeout=60)

        def removed(*_: object) -> Any:
            monkeypatch.undo()
            client.push(rows, epoch=1, k=4)
            client.table(epoch=1, timeout=60)
            client.delete_generation(first.generation)
            raise FileNotFoundError(2, "No such file or directory")

        monkeypatch.setattr("nearkin_client.tables.map_table", removed)
        assert client.table(epoch=0, timeout=60).epoch == 1
        with pytest.raises(NotFound):
            client.table(generation=first.generation)


def test_rows_of_others_are_sent_in_messages_that_the_service_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only sending them shows whether they are the same; what is written in place goes in larger pieces."""
    monkeypatch.setattr("nearkin_client.push.IN_PLACE_SHARE", 1)
    rows = generator.standard_normal((6144, 1024)).astype(np.float32)
    limits = ("--limit", "max_message_bytes=4MiB", "--limit", "max_row_bytes=1MiB")
    with LocalService(tmp_path, options=limits) as service:
        with NeighbourClient(service.address, run="others", shared_memory=False) as other:
            other.push(rows[50:4000], epoch=0, row_start=50, num_classes=len(rows), k=4, commit=False)
        with NeighbourClient(service.address, run="others", shared_memory=True) as client:
            assert client.push(rows, epoch=0, k=4, commit=False).rows_stored == len(rows)
