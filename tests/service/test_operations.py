"""What an operator sees and sets: limits, metrics, health, logs, leaks."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_service import faults, settings
from nearkin_service.config import GIB, Limits
from nearkin_service.logs import JsonFormatter

from tests.service.conftest import WAIT, Caller, Service, Serving, eventually, random_rows, refusal

Start = Callable[..., Service]
Serve = Callable[..., Serving]
ROWS = random_rows(30, 8)


# ------------------------------------------------------------------------------------------------ limits


def test_limits_come_from_a_file_and_from_options(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text('max_runs = 7\nmax_push_bytes = "100 GiB"\n')
    found = settings.limits(file, ["max_runs=9", "max_memory_bytes=3GiB"])
    assert (found.max_runs, found.max_push_bytes, found.max_memory_bytes) == (9, 100 * GIB, 3 * GIB)


@pytest.mark.parametrize(
    "wrong", ["max_runs", "max_rums=3", "max_runs=-3", "max_runs=many", "max_runs=0", "max_runs=1__0"]
)
def test_wrong_limits_are_said(wrong: str) -> None:
    with pytest.raises(ValueError, match="max_ru"):
        settings.limits(None, [wrong])


@pytest.mark.parametrize("name", Limits.__slots__)
def test_a_limit_at_its_edges_is_served_and_one_beyond_is_refused(start_service: Start, name: str) -> None:
    """What the protocol cannot report, or gRPC cannot take, is said before the service starts."""
    with pytest.raises(ValueError, match=f"{name} is .* in [0-9]+[.][.][0-9]+") as said:
        settings.limits(None, [f"{name}=99999999TiB"])
    least, most = re.findall("[0-9]+", str(said.value).split(" in ")[1])
    with pytest.raises(ValueError, match=name):
        settings.limits(None, [f"{name}={int(most) + 1}"])
    others = [f"max_row_bytes={least}"] if name == "max_message_bytes" else []
    for value in (least, most):
        limits = settings.limits(None, [*others, "max_message_bytes=2147418111", f"{name}={value}"])
        service = start_service(limits=limits)
        reported = service.caller().stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT)
        service.stop()
        assert getattr(reported.limits, name) == int(value)
        assert reported.chunk_bytes <= reported.limits.max_message_bytes


def test_a_file_of_limits_that_is_nested_too_deeply_is_refused_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text("max_k = " + 5000 * "[" + 5000 * "]")
    with pytest.raises(ValueError, match="--limits"):
        settings.limits(file, [])


def begun_at_once(caller: Caller, count: int) -> list[str]:
    """How many calls end that begin a push of another run each, all at the same time: "" if well."""
    rows: dict[str, Any] = {"num_classes": 1000, "row_shape": [1000], "dtype": pb.DTYPE_FLOAT32, "k": 3}
    requests = [pb.BeginPushRequest(run=f"run{each}", **rows) for each in range(count)]
    calls: list[Any] = [caller.stub.BeginPush.future(each, timeout=WAIT) for each in requests]
    return ["" if call.exception() is None else call.details().split(":")[0] for call in calls]


def test_pushes_that_begin_at_the_same_time_are_no_more_than_may_be_open(start_service: Start) -> None:
    service = start_service(limits=Limits(max_open_pushes=3))
    directory = service.server.core.directory
    create = directory.create_push

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.1)
        return create(*arguments)

    with mock.patch.object(directory, "create_push", slowly):
        ended = begun_at_once(service.caller(), 20)
    assert sorted(set(ended)) == ["", "max_open_pushes"]
    assert ended.count("") == 3


def test_pushes_that_begin_at_the_same_time_share_the_disk(start_service: Start, tmp_path: Path) -> None:
    """4 MB each; who is refused leaves no run behind."""
    service = start_service(limits=Limits(min_free_disk_bytes=0))
    service.server.core.directory.free_bytes = lambda: 10_000_000  # type: ignore[method-assign]
    ended = begun_at_once(service.caller(), 20)
    assert sorted(set(ended)) == ["", "min_free_disk_bytes"]
    assert ended.count("") == 2
    assert len(list((tmp_path / "data/runs").iterdir())) == 2


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0])
def test_seconds_to_drain_are_a_number(start_service: Start, seconds: float) -> None:
    with pytest.raises(ValueError, match="drain_seconds"):
        start_service(drain_seconds=seconds)


def test_every_limit_is_reported(start_service: Start) -> None:
    limits = Limits(max_runs=12, max_stream_idle_seconds=77, max_memory_bytes=5 * GIB)
    caller = start_service(limits=limits).caller()
    reported = caller.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=WAIT).limits
    for name in Limits.__slots__:
        assert getattr(reported, name) == getattr(limits, name), name
    assert {each.name for each in pb.Limits.DESCRIPTOR.fields} == set(Limits.__slots__)


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        (Limits(max_memory_bytes=1000), "max_memory_bytes"),
        (Limits(max_run_bytes=1000), "max_run_bytes"),
        (Limits(max_num_classes=29), "max_num_classes"),
        (Limits(max_row_bytes=31), "max_row_bytes"),
        (Limits(max_push_bytes=900), "max_push_bytes"),
        (Limits(max_k=4), "max_k"),
        (Limits(min_free_disk_bytes=1 << 60), "min_free_disk_bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_push_beyond_a_limit_is_refused_by_name(start_service: Start, limits: Limits, named: str) -> None:
    error = refusal(lambda: start_service(limits=limits).caller().begin(ROWS))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(error.details()).startswith(named)


def test_one_run_cannot_take_every_place_of_waiting_readers(start_service: Start) -> None:
    limits = Limits(max_waiting_readers=10, max_waiting_readers_per_run=2)
    service = start_service(limits=limits, http="127.0.0.1:0")
    caller = service.caller()
    request = pb.ReadTableRequest(run="greedy", min_epoch=1)
    waiting = [caller.stub.ReadTable(request, timeout=WAIT) for _ in range(2)]
    eventually(lambda: scrape(service)["nearkin_waiting_readers"], lambda count: count == 2)
    assert outcome(caller, "greedy") == "RESOURCE_EXHAUSTED"
    assert outcome(caller, "modest") == "DEADLINE_EXCEEDED"
    for stream in waiting:
        stream.cancel()


def outcome(caller: Caller, run: str) -> str:
    request = pb.ReadTableRequest(run=run, min_epoch=1)
    return refusal(lambda: list(caller.stub.ReadTable(request, timeout=0.3))).code().name


# ------------------------------------------------------------------------------------- metrics and health


def scrape(service: Service) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{service.server.http_address}/metrics", timeout=WAIT) as reply:
        lines = reply.read().decode().splitlines()
    pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def test_metrics_tell_what_happened(start_service: Start) -> None:
    service = start_service(http="127.0.0.1:0")
    caller = service.caller()
    caller.push(ROWS)
    refusal(lambda: caller.begin(ROWS, k=0))
    found = scrape(service)
    assert found["nearkin_push_bytes_total"] == ROWS.nbytes
    assert found["nearkin_generations_published_total"] == 1
    assert found['nearkin_generations{run="run"}'] == 1
    assert found['nearkin_run_bytes{run="run"}'] > ROWS.nbytes
    assert 0 <= found['nearkin_newest_generation_age_seconds{run="run"}'] < 60
    assert found['nearkin_errors_total{code="INVALID_ARGUMENT",method="BeginPush"}'] == 1
    assert found['nearkin_build_seconds_count{stage="total"}'] == 1
    for name in ("waiting_readers", "queued_builds", "open_pushes", "quarantined"):
        assert found[f"nearkin_{name}"] == 0
    assert found["process_resident_memory_bytes"] > 0
    assert found["nearkin_disk_free_bytes"] > 0
    caller.stub.DeleteRun(pb.DeleteRunRequest(run="run"), timeout=WAIT)
    assert not [name for name in scrape(service) if 'run="run"' in name]


def test_each_run_has_its_health(caller: Caller) -> None:
    health = health_pb2_grpc.HealthStub(caller.channel)

    def state(name: str) -> Any:
        return health.Check(health_pb2.HealthCheckRequest(service=name), timeout=WAIT).status

    assert refusal(lambda: state("run/run")).code() is grpc.StatusCode.NOT_FOUND
    caller.push(ROWS)
    assert state("run/run") == state("") == health_pb2.HealthCheckResponse.SERVING
    zero = ROWS * 0
    refusal(lambda: caller.write(caller.begin(zero, 1).push.push_id, zero))
    assert state("run/run") == health_pb2.HealthCheckResponse.NOT_SERVING
    caller.push(ROWS, 2)
    assert state("run/run") == health_pb2.HealthCheckResponse.SERVING


def test_probes_answer_while_hundreds_of_readers_wait(start_service: Start) -> None:
    service = start_service(http="127.0.0.1:0")
    caller = service.caller()
    request = pb.ReadTableRequest(run="later", min_epoch=0)
    waiting = [caller.stub.ReadTable(request, timeout=WAIT) for _ in range(400)]
    eventually(lambda: scrape(service)["nearkin_waiting_readers"], lambda count: count == 400)
    for path in ("livez", "readyz"):
        with urllib.request.urlopen(f"http://{service.server.http_address}/{path}", timeout=2) as reply:
            assert reply.status == 200
    health = health_pb2_grpc.HealthStub(caller.channel)
    assert health.Check(health_pb2.HealthCheckRequest(), timeout=2).status == 1
    caller.push(ROWS, run="later")
    assert all(next(stream).header.row_count == 30 for stream in waiting)


# -------------------------------------------------------------------------------------------------- logs


def test_json_logs_carry_the_ids() -> None:
    record = logging.LogRecord(
        "nearkin.push",
        logging.INFO,
        "",
        0,
        "run %s epoch %d: push %s opened, %d rows",
        ("a", 3, "ff", 9),
        None,
    )
    line = json.loads(JsonFormatter().format(record))
    assert {"run": "a", "epoch": 3, "push": "ff", "level": "info"}.items() <= line.items()
    assert line["message"] == "run a epoch 3: push ff opened, 9 rows"


def test_a_process_logs_json(serve: Serve) -> None:
    serving = serve("--log-format", "json")
    caller = serving.caller()
    push_id = caller.push(ROWS)
    caller.channel.close()
    assert serving.terminate() == 0
    lines = [json.loads(line) for line in serving.log.read_text().splitlines()]
    published = [line for line in lines if line.get("generation") == 1]
    assert published
    assert published[0]["run"] == "run"
    assert any(line.get("push") == push_id for line in lines)


# ------------------------------------------------------------------------------------------------- leaks


def status_of(pid: int) -> dict[str, int]:
    """Resident memory (kB), threads, open descriptors and mappings of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    facts = dict(line.split(":", 1) for line in lines)
    return {
        "memory": int(facts["VmRSS"].split()[0]),
        "threads": int(facts["Threads"]),
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "mappings": len(Path(f"/proc/{pid}/maps").read_text().splitlines()),
    }


def live_on(caller: Caller, epochs: range) -> None:
    rows = random_rows(400, 64)
    for epoch in epochs:
        caller.push(rows + epoch, epoch, retention=pb.Retention(keep_embeddings=2, keep_tables=3))
        caller.nearest([1, 2, 3])


def growth(serve: Serve, first: int, last: int) -> tuple[dict[str, int], dict[str, int]]:
    serving = serve("--engine", "flat")
    caller = serving.caller()
    live_on(caller, range(first))
    before = status_of(serving.process.pid)
    live_on(caller, range(first, last))
    eventually(lambda: len(caller.generations()), lambda count: count == 3)
    after = status_of(serving.process.pid)
    caller.channel.close()
    return before, after


def test_a_service_does_not_grow(serve: Serve) -> None:
    before, after = growth(serve, 10, 40)
    assert after["memory"] < 1.1 * before["memory"], (before, after)
    for name in ("threads", "descriptors"):
        assert after[name] <= before[name] + 4, (before, after)


@pytest.mark.soak
def test_memory_after_200_generations_is_that_after_20(serve: Serve) -> None:
    before, after = growth(serve, 20, 200)
    print(json.dumps({"after_20": before, "after_200": after}))
    assert after["memory"] < 1.1 * before["memory"], (before, after)
    for name in ("threads", "descriptors"):
        assert after[name] <= before[name] + 2, (before, after)


def test_callers_that_vanish_leave_nothing(service: Service) -> None:
    caller = service.caller()
    caller.push(ROWS)
    before = (threading.active_count(), len(list(Path("/proc/self/fd").iterdir())))
    for _ in range(30):
        passing = Caller(service.server.addresses[0])
        stream = passing.stub.WatchRun(pb.WatchRunRequest(run="run"))
        next(stream)
        passing.stub.ReadTable(pb.ReadTableRequest(run="run", min_epoch=9))
        passing.channel.close()
    assert eventually(
        lambda: (threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))),
        lambda now: now[0] <= before[0] + 3 and now[1] <= before[1] + 6,
    )


def test_a_caller_who_leaves_in_the_middle_leaves_nothing_half_done(
    caller: Caller, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = faults.point

    def slow(name: str) -> None:
        time.sleep(0.3 if name == "push.rows_made" else 0)
        real(name)

    monkeypatch.setattr(faults, "point", slow)
    for epoch in range(3):
        request = pb.BeginPushRequest(
            run="run", epoch=epoch, num_classes=30, row_shape=[8], dtype=pb.DTYPE_FLOAT32, k=5
        )
        with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
            caller.stub.BeginPush(request, timeout=0.1)
    made = eventually(lambda: [path.name for path in tmp_path.glob("data/runs/run/pushes/*")], _are_three)
    known = eventually(
        lambda: [each.push_id for each in caller.stub.GetRun(pb.GetRunRequest(run="run")).pushes], _are_three
    )
    assert set(made) == set(known)


def _are_three(found: list[str]) -> bool:
    return len(found) == 3
