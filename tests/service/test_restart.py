"""Real processes that are killed, and data directories that were damaged while nobody looked."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service.store import generation_files, push_files

from tests.service.conftest import (
    Caller,
    Service,
    Serving,
    brute_force,
    eventually,
    message,
    random_rows,
    refusal,
)

ROWS = random_rows(400, 16)
Start = Callable[..., Service]
Serve = Callable[..., Serving]


def test_killed_in_the_middle_of_a_push(serve: Serve) -> None:
    """What was acknowledged, and what merely arrived, is there after SIGKILL; the push goes on from there."""
    first = serve()
    caller = first.caller()
    push_id = caller.begin(ROWS, absent=[399]).push.push_id
    caller.write(push_id, ROWS[:100], step=10)
    holding = threading.Event()

    def unfinished() -> Any:
        for start in range(200, 300, 10):
            yield message(push_id, ROWS[start : start + 10], start)
        holding.wait(30)

    stream = caller.stub.WriteRows.future(unfinished())
    eventually(lambda: caller.state(push_id).rows_stored, lambda stored: stored == 200)
    first.kill()
    holding.set()
    assert code_after_kill(stream)

    caller = serve().caller()
    push = caller.state(push_id)
    assert push.state == pb.PUSH_STATE_OPEN
    assert [(r.start, r.count) for r in push.stored] == [(0, 100), (200, 100)]
    assert push.absent_count == 1
    assert caller.begin(ROWS, absent=[399]).push.push_id == push_id
    error = refusal(lambda: caller.write(push_id, ROWS[1:2], start=0))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS, "rows from before are still compared"
    caller.write(push_id, ROWS[100:200], start=100)
    assert caller.write(push_id, ROWS[300:399], start=300).complete
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(ROWS, 5, absent=[399]))


def code_after_kill(stream: Any) -> bool:
    return stream.exception(timeout=10) is not None


def test_killed_right_after_the_last_row(serve: Serve) -> None:
    """A closed push is built by the next service, whether or not this one had begun."""
    first = serve()
    caller = first.caller()
    push_id = caller.begin(ROWS).push.push_id
    caller.write(push_id, ROWS)
    first.kill()
    caller = serve().caller()
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(ROWS, 5))
    assert caller.ended(push_id).generation == 1


def test_who_has_vouched_for_rows_need_not_do_so_again(serve: Serve) -> None:
    first = serve()
    caller = first.caller()
    push_id = caller.begin(ROWS, commit_when_complete=False).push.push_id
    caller.write(push_id, ROWS)
    assert caller.vouch(push_id, ROWS[:300]).state == pb.PUSH_STATE_OPEN
    first.kill()
    caller = serve().caller()
    assert caller.state(push_id).state == pb.PUSH_STATE_OPEN
    caller.vouch(push_id, ROWS[300:], 300)
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(ROWS, 5))


def test_killed_after_publications(serve: Serve, tmp_path: Path) -> None:
    first = serve()
    caller = first.caller()
    for epoch in range(3):
        caller.push(ROWS + epoch, epoch)
    tables = [caller.table(generation=number) for number in (1, 2, 3)]
    first.kill()
    second = serve()
    caller = second.caller()
    for table in tables:
        again = caller.table(generation=table.generation.generation)
        assert again.ids.tobytes() == table.ids.tobytes()
        assert again.generation.ids_crc32c == table.generation.ids_crc32c
    assert caller.nearest([7]).rows[0].ids == tables[2].ids[7].tolist()
    left = [p.name for p in (tmp_path / "data").rglob("*") if "aside" in p.name]
    assert not left
    assert not list((tmp_path / "data/runs/run/pushes").iterdir())
    assert second.terminate() == 0


def test_terminated_gently(serve: Serve, tmp_path: Path) -> None:
    """Waiting readers and watchers are told, the build that runs is finished, the socket goes."""
    serving = serve("--drain-seconds", "20")
    caller = serving.caller()
    rows = random_rows(6000, 64)
    caller.push(rows[:50])
    waiting = caller.stub.ReadTable(pb.ReadTableRequest(run="run", min_epoch=9))
    watching = caller.stub.WatchRun(pb.WatchRunRequest(run="run"))
    next(watching)
    caller.write(caller.begin(rows, epoch=1).push.push_id, rows, step=1000)
    assert serving.terminate() == 0
    for stream in (waiting, watching):
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not (tmp_path / "serve.sock").exists()
    assert (tmp_path / "data/runs/run/generations/2/manifest.json").exists()


def test_a_stop_ends_in_time_whoever_hangs_on(start_service: Start) -> None:
    """A writer that stalls and a reader that takes nothing get what time there is; what is stored stays."""
    service = start_service(drain_seconds=2.0)
    caller = service.caller()
    caller.push(random_rows(3000, 4), k=2000)  # more than a connection takes on its own
    deaf = caller.stub.ReadTable(pb.ReadTableRequest(run="run", with_scores=True))
    next(deaf)
    push_id = caller.begin(ROWS, 1).push.push_id
    released = threading.Event()

    def stalling() -> Any:
        yield message(push_id, ROWS[:10], 0)
        released.wait(30)

    writing = caller.stub.WriteRows.future(stalling())
    eventually(lambda: caller.state(push_id).rows_stored, lambda stored: stored == 10)
    service.callers.clear()  # none of them is closed
    service.stop()
    released.set()
    for call in (lambda: list(deaf), writing.result):
        assert refusal(call).code() is grpc.StatusCode.UNAVAILABLE
    caller.channel.close()
    assert start_service().caller().state(push_id).rows_stored == 10


def test_two_services_cannot_share_a_directory_or_a_socket(serve: Serve, tmp_path: Path) -> None:
    serving = serve()
    assert "in use by another nearkin-serve" in failing(tmp_path / "data", f"unix://{tmp_path}/other.sock")
    assert "another service listens" in failing(tmp_path / "elsewhere", serving.address)
    assert serving.caller().stub.GetServerInfo(pb.GetServerInfoRequest()).version


def test_a_socket_of_a_dead_service_is_replaced(serve: Serve, tmp_path: Path) -> None:
    serve().kill()
    assert stat.S_ISSOCK((tmp_path / "serve.sock").lstat().st_mode)
    serving = serve()
    assert serving.caller().stub.GetServerInfo(pb.GetServerInfoRequest()).version
    assert stat.S_IMODE((tmp_path / "serve.sock").lstat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--listen", "0.0.0.0:0"], "--insecure"),
        (["--listen", "nonsense"], "neither unix:///path nor host:port"),
        (["--listen", "unix:///" + "x" * 200], "shorter"),
        (["--device", "tpu"], "not auto, cpu or cuda"),
        (["--device", "cuda"], "cuda"),
        (["--keep-embeddings", "0"], "keep_embeddings"),
        (["--engine", "no-such"], "no-such"),
        (["--http", "203.0.113.1:1"], "--http"),
    ],
)
def test_what_cannot_be_served_is_said(tmp_path: Path, options: list[str], expected: str) -> None:
    assert expected in failing(tmp_path / "data", f"unix://{tmp_path}/s.sock", *options)


def failing(data_dir: Path, listen: str, *options: str) -> str:
    command = [sys.executable, "-m", "nearkin_service", "--data-dir", str(data_dir)]
    if "--listen" not in options:
        options = ("--listen", listen, *options)
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_help_teaches() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nearkin_service", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    for word in ("--listen", "--data-dir", "--engine", "--device", "--http", "--insecure", "Examples"):
        assert word in done.stdout


def test_several_addresses_ports_and_a_ready_file(serve: Serve, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    serve("--listen", "127.0.0.1:0", "--ready-file", str(ready))
    unix, tcp = ready.read_text().split()
    for address in (unix, tcp):
        assert Caller(address).stub.GetServerInfo(pb.GetServerInfoRequest()).version
    assert not tcp.endswith(":0")


# ------------------------------------------------------------------------------------- damaged directories


def push_with_a_damaged_row(start_service: Start, tmp_path: Path) -> str:
    """A push whose rows 0..299 came in three messages; row 150 has changed since. Nobody serves it."""
    service = start_service()
    caller = service.caller()
    push_id = caller.begin(ROWS).push.push_id
    caller.write(push_id, ROWS[:300], step=100)
    service.stop()
    flip(tmp_path / "data/runs/run/pushes" / push_id / "rows.bin", at=150 * 64)
    return push_id


def flip(path: Path, at: int = 9) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink], ids=["flip", "cut", "unlink"])
@pytest.mark.parametrize("name", ["manifest.json", "ids.bin", "scores.bin", "absent.bin"])
def test_a_damaged_generation_is_set_aside_and_the_others_served(
    start_service: Start, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    service = start_service()
    caller = service.caller()
    for epoch in range(3):
        caller.push(ROWS + epoch, epoch, absent=[1, 2])
    service.stop()
    damage(tmp_path / "data/runs/run/generations/2" / name)
    caller = start_service().caller()
    assert [g.generation for g in caller.generations()] == [3, 1]
    assert len(caller.table(generation=1).ids) == 400
    (aside,) = (tmp_path / "data/quarantine").iterdir()
    assert aside.name.startswith("run-2-")
    caller.push(ROWS, epoch=3)
    assert caller.table().generation.generation == 4, "its number is not given again"


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink], ids=["flip", "cut", "unlink"])
@pytest.mark.parametrize("name", ["rows.bin", "journal"])
def test_damaged_embeddings_cost_the_queries_not_the_table(
    start_service: Start, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    service = start_service()
    caller = service.caller()
    caller.push(ROWS)
    eventually(lambda: caller.generation().embeddings, lambda s: s == pb.EMBEDDINGS_STATE_KEPT)
    service.stop()
    damage(tmp_path / "data/runs/run/generations/1" / name)
    caller = start_service().caller()
    np.testing.assert_array_equal(caller.table().ids, brute_force(ROWS, 5))
    assert refusal(lambda: caller.nearest([1])).code() is grpc.StatusCode.DATA_LOSS
    assert caller.generation().embeddings == pb.EMBEDDINGS_STATE_LOST


def test_files_cut_short_under_a_running_service_are_data_loss(start_service: Start, tmp_path: Path) -> None:
    caller = start_service().caller()
    for epoch in range(2):
        caller.push(ROWS + epoch, epoch)
    for name in ("ids.bin", "rows.bin"):
        cut(tmp_path / "data/runs/run/generations/1" / name)
    compare = pb.CompareGenerationsRequest(run="run", generation=2, base_generation=1)
    for call in (
        lambda: caller.table(generation=1),
        lambda: caller.nearest([1], generation=1),
        lambda: caller.stub.CompareGenerations(compare, timeout=30),
    ):
        assert refusal(call).code() is grpc.StatusCode.DATA_LOSS
    np.testing.assert_array_equal(caller.table(generation=2).ids, brute_force(ROWS + 1, 5))


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink], ids=["flip", "cut", "unlink"])
def test_a_damaged_note_on_the_embeddings_costs_nothing(
    start_service: Start, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    service = start_service()
    caller = service.caller()
    caller.push(ROWS)
    eventually(lambda: caller.generation().embeddings, lambda s: s == pb.EMBEDDINGS_STATE_KEPT)
    service.stop()
    damage(tmp_path / "data/runs/run/generations/1/embeddings.json")
    caller = start_service().caller()
    assert caller.nearest([1]).rows[0].ids == brute_force(ROWS, 5)[1].tolist()
    eventually(lambda: caller.generation().embeddings, lambda s: s == pb.EMBEDDINGS_STATE_KEPT)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink], ids=["flip", "cut", "unlink"])
@pytest.mark.parametrize("name", ["push.json", "journal", "rows.bin"])
def test_a_damaged_push_never_stops_the_service(
    start_service: Start, tmp_path: Path, name: str, damage: Callable[[Path], None]
) -> None:
    service = start_service()
    caller = service.caller()
    push_id = caller.begin(ROWS).push.push_id
    caller.write(push_id, ROWS[:300], step=100)
    service.stop()
    damage(tmp_path / "data/runs/run/pushes" / push_id / name)
    caller = start_service().caller()
    caller.push(ROWS + 1, epoch=1)
    assert caller.table().generation.epoch == 1


def test_rows_damaged_in_an_open_push_are_not_blamed_on_who_sends_them_again(
    start_service: Start, tmp_path: Path
) -> None:
    push_id = push_with_a_damaged_row(start_service, tmp_path)
    caller = start_service().caller()
    caller.write(push_id, ROWS[:100])
    error = refusal(lambda: caller.write(push_id, ROWS[:200]))
    assert error.code() is grpc.StatusCode.DATA_LOSS
    assert "rows 100..199" in str(error.details())
    wrong = refusal(lambda: caller.write(push_id, ROWS[1:2], start=0))
    assert wrong.code() is grpc.StatusCode.ALREADY_EXISTS
    caller.stub.AbortPush(pb.AbortPushRequest(push_id=push_id), timeout=30)
    caller.push(ROWS)
    np.testing.assert_array_equal(caller.table().ids, brute_force(ROWS, 5))


def as_directory(path: Path, _outside: Path) -> None:
    path.unlink()
    path.mkdir()


def as_link(path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to(outside)


def as_pipe(path: Path, _outside: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("become", [as_directory, as_link, as_pipe])
@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "generations/2/manifest.json",
        "generations/2/ids.bin",
        "generations/2/journal",
        "generations/2/embeddings.json",
        "pushes/*/push.json",
        "pushes/*/journal",
        "pushes/*/rows.bin",
    ],
)
def test_what_is_no_plain_file_is_set_aside_and_never_followed(
    start_service: Start, tmp_path: Path, name: str, become: Callable[[Path, Path], None]
) -> None:
    service = start_service()
    caller = service.caller()
    for epoch in range(3):
        caller.push(ROWS[:40] + epoch, epoch)
    caller.write(caller.begin(ROWS[:40], 9).push.push_id, ROWS[:20])
    service.stop()
    outside = tmp_path / "outside"
    outside.write_bytes(b"not ours" * 1000)
    (path,) = (tmp_path / "data/runs/run").glob(name)
    become(path, outside)
    caller = start_service().caller()
    kept = {g.generation for g in caller.generations()}
    assert kept == ({1, 3} if name.startswith("generations") else {1, 2, 3})
    for number in kept:
        table = caller.table(generation=number)
        np.testing.assert_array_equal(table.ids, brute_force(ROWS[:40] + number - 1, 5))
    caller.push(ROWS[:40], 9)
    np.testing.assert_array_equal(caller.table(min_epoch=9).ids, brute_force(ROWS[:40], 5))
    assert outside.read_bytes() == b"not ours" * 1000


def test_a_start_clears_away_whatever_is_left(start_service: Start, tmp_path: Path) -> None:
    for place in ("trash", "spares"):
        (tmp_path / "data" / place / "directory" / "in it").mkdir(parents=True)
        (tmp_path / "data" / place / "file").touch()
        (tmp_path / "data" / place / "link").symlink_to(tmp_path)
    start_service()
    assert not [left for place in ("trash", "spares") for left in (tmp_path / "data" / place).iterdir()]
    assert tmp_path.is_dir()


def test_a_torn_journal_means_rows_sent_again(start_service: Start, tmp_path: Path) -> None:
    service = start_service()
    caller = service.caller()
    push_id = caller.begin(ROWS).push.push_id
    caller.write(push_id, ROWS[:300], step=100)
    service.stop()
    journal = tmp_path / "data/runs/run/pushes" / push_id / "journal"
    os.truncate(journal, journal.stat().st_size - 5)
    caller = start_service().caller()
    stored = caller.state(push_id).rows_stored
    assert stored == 200
    caller.write(push_id, ROWS)
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(ROWS, 5))


class TestAfterTheMachineDied:
    """Another boot id means that pages which were never flushed may be gone."""

    @pytest.fixture
    def reboot(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
        def reboot() -> None:
            for module in (push_files, generation_files):
                monkeypatch.setattr(module, "boot_id", lambda: "another boot")

        return reboot

    def test_lost_rows_of_a_push_are_sent_again(
        self, start_service: Start, tmp_path: Path, reboot: Callable[[], None]
    ) -> None:
        push_id = push_with_a_damaged_row(start_service, tmp_path)
        reboot()
        caller = start_service().caller()
        push = caller.state(push_id)
        assert [(r.start, r.count) for r in push.stored] == [(0, 100), (200, 100)]
        caller.write(push_id, ROWS)
        np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(ROWS, 5))

    @pytest.mark.parametrize("damaged", [True, False])
    def test_unflushed_embeddings_are_verified(
        self,
        start_service: Start,
        tmp_path: Path,
        reboot: Callable[[], None],
        monkeypatch: pytest.MonkeyPatch,
        *,
        damaged: bool,
    ) -> None:
        monkeypatch.setattr(generation_files, "flush", never_flush)
        service = start_service()
        caller = service.caller()
        caller.push(ROWS)
        assert caller.generation().embeddings == pb.EMBEDDINGS_STATE_FLUSHING
        service.stop()
        monkeypatch.undo()
        if damaged:
            flip(tmp_path / "data/runs/run/generations/1/rows.bin")
        reboot()
        caller = start_service().caller()
        assert len(caller.table().ids) == 400
        if damaged:
            assert refusal(lambda: caller.nearest([1])).code() is grpc.StatusCode.DATA_LOSS
        else:
            eventually(lambda: caller.generation().embeddings, lambda s: s == pb.EMBEDDINGS_STATE_KEPT)
            assert len(caller.nearest([1]).rows) == 1


def never_flush(_directory: Path) -> Any:
    raise OSError("the machine dies first")


def test_a_newer_format_is_left_alone(tmp_path: Path) -> None:
    from nearkin_service.store.atomic import write_document

    (tmp_path / "data").mkdir()
    write_document(tmp_path / "data/nearkin.json", {"format": 99})
    assert "format 99" in failing(tmp_path / "data", f"unix://{tmp_path}/s.sock")


def test_readers_wait_through_a_restart(serve: Serve) -> None:
    """Not one connection survives SIGKILL, but the epoch does: asking again gets it."""
    first = serve()
    caller = first.caller()
    caller.write(caller.begin(ROWS).push.push_id, ROWS[:399])
    first.kill()
    caller = serve().caller()
    result: list[Any] = []
    reader = threading.Thread(target=lambda: result.append(caller.table(min_epoch=0)))
    reader.start()
    time.sleep(0.2)
    caller.write(caller.begin(ROWS).push.push_id, ROWS[399:], start=399)
    reader.join(20)
    np.testing.assert_array_equal(result[0].ids, brute_force(ROWS, 5))
