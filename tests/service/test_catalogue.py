"""Listing, looking up, removing, watching; server info, health, reflection, HTTP."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from nearkin.v1 import neighbours_pb2 as pb

from tests.service.conftest import Caller, Service, brute_force, eventually, random_rows, refusal

ROWS = random_rows(20, 4)


def test_lists_are_paged(caller: Caller) -> None:
    names = [f"run-{number}" for number in range(5)]
    for name in reversed(names):
        caller.begin(ROWS, run=name)
    found: list[str] = []
    token = ""
    while True:
        page = caller.stub.ListRuns(pb.ListRunsRequest(page_size=2, page_token=token))
        assert len(page.runs) <= 2
        found += [run.run for run in page.runs]
        token = page.next_page_token
        if not token:
            break
    assert found == names


def test_generations_are_paged_newest_first(caller: Caller) -> None:
    for epoch in range(5):
        caller.push(ROWS, epoch)
    first = caller.stub.ListGenerations(pb.ListGenerationsRequest(run="run", page_size=3))
    rest = caller.stub.ListGenerations(
        pb.ListGenerationsRequest(run="run", page_size=3, page_token=first.next_page_token)
    )
    assert [g.generation for g in (*first.generations, *rest.generations)] == [5, 4, 3, 2, 1]
    assert not rest.next_page_token
    negative = pb.ListGenerationsRequest(run="run", page_size=-1)
    assert refusal(lambda: caller.stub.ListGenerations(negative)).code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("token", ["x", "0", "02", "-1", "6", "²", "9" * 40])
def test_a_page_of_generations_that_nothing_led_to(caller: Caller, token: str) -> None:
    for epoch in range(5):
        caller.push(ROWS, epoch)
    request = pb.ListGenerationsRequest(run="run", page_token=token)
    assert_strange(refusal(lambda: caller.stub.ListGenerations(request)))


@pytest.mark.parametrize("token", ["RUN", "run 1", "-", "../etc", "a" * 65, "é", "run\n"])
def test_a_page_of_runs_that_nothing_led_to(caller: Caller, token: str) -> None:
    caller.begin(ROWS)
    assert_strange(refusal(lambda: caller.stub.ListRuns(pb.ListRunsRequest(page_token=token))))


def assert_strange(error: Any) -> None:
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith("page_token: ")


def test_a_page_goes_on_where_a_run_was_deleted(caller: Caller) -> None:
    for name in ("a", "b", "c"):
        caller.begin(ROWS, run=name)
    token = caller.stub.ListRuns(pb.ListRunsRequest(page_size=2)).next_page_token
    caller.stub.DeleteRun(pb.DeleteRunRequest(run="b"))
    rest = caller.stub.ListRuns(pb.ListRunsRequest(page_size=2, page_token=token)).runs
    assert [each.run for each in rest] == ["c"]


def test_a_generation_tells_how_it_came_about(caller: Caller) -> None:
    rows = random_rows(20, 3, 2, 2)
    push_id = caller.push(rows, epoch=6, k=7, key=pb.KEY_POOLED, absent=[4], engine="flat")
    found = caller.generation()
    assert (found.run, found.generation, found.epoch, found.push_id) == ("run", 1, 6, push_id)
    assert (found.num_classes, list(found.row_shape), found.k, found.absent_count) == (20, [3, 2, 2], 7, 1)
    assert (found.dtype, found.key, found.engine, found.device) == (
        pb.DTYPE_FLOAT32,
        pb.KEY_POOLED,
        "flat",
        "cpu",
    )
    assert found.exact
    assert not found.HasField("recall")
    assert found.build_seconds > 0
    assert found.stage_seconds
    assert found.versions["numpy"] == np.__version__
    pooled = rows.mean(axis=(2, 3))
    np.testing.assert_array_equal(caller.table().ids, brute_force(pooled, 7, absent=[4]))


def test_a_run_counts_what_it_holds(caller: Caller) -> None:
    caller.push(ROWS, k=5)
    caller.write(caller.begin(ROWS, epoch=1).push.push_id, ROWS[:7])
    run = caller.stub.GetRun(pb.GetRunRequest(run="run"))
    assert (run.generations, run.newest.generation) == (1, 1)
    assert [(push.epoch, push.rows_stored) for push in run.pushes] == [(1, 7)]
    assert run.bytes_on_disk == 20 * 16 + 20 * 5 * 8 + 7 * 16


def test_numbers_are_never_given_again(caller: Caller) -> None:
    for epoch in range(2):
        caller.push(ROWS, epoch)
    caller.stub.DeleteGeneration(pb.DeleteGenerationRequest(run="run", generation=2))
    assert refusal(lambda: caller.table(generation=2)).code() is grpc.StatusCode.NOT_FOUND
    assert caller.table().generation.generation == 1
    caller.push(ROWS * 2, epoch=1)
    assert caller.table().generation.generation == 3


def test_a_deleted_run_is_gone_and_its_name_free(caller: Caller, tmp_path: Any) -> None:
    caller.push(ROWS)
    open_push = caller.begin(ROWS, epoch=1).push.push_id
    caller.write(open_push, ROWS[:3])
    caller.stub.DeleteRun(pb.DeleteRunRequest(run="run"))
    assert not caller.stub.ListRuns(pb.ListRunsRequest()).runs
    assert refusal(lambda: caller.state(open_push)).code() is grpc.StatusCode.NOT_FOUND
    assert not list((tmp_path / "data/runs").iterdir())
    caller.push(ROWS)
    assert caller.table().generation.generation == 1


def collect(
    caller: Caller, run: str, until: Callable[[pb.RunEvent], bool]
) -> tuple[threading.Thread, list[pb.RunEvent]]:
    events: list[pb.RunEvent] = []
    stream = caller.stub.WatchRun(pb.WatchRunRequest(run=run), timeout=20)

    def watch() -> None:
        for event in stream:
            events.append(event)
            if until(event):
                stream.cancel()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    return thread, events


def test_watching_sees_a_run_from_before_its_birth_to_its_end(caller: Caller) -> None:
    thread, events = collect(caller, "run", lambda event: event.run_removed)
    caller.push(ROWS)
    caller.stub.AbortPush(pb.AbortPushRequest(push_id=caller.begin(ROWS, epoch=1).push.push_id))
    caller.stub.DeleteGeneration(pb.DeleteGenerationRequest(run="run", generation=1))
    caller.stub.DeleteRun(pb.DeleteRunRequest(run="run"))
    thread.join(20)
    kinds = [str(event.WhichOneof("event")) for event in events]
    assert kinds[0] == "snapshot"
    assert kinds[-1] == "run_removed"
    states = [event.push.state for event in events if event.HasField("push")]
    for state in (pb.PUSH_STATE_BUILDING, pb.PUSH_STATE_PUBLISHED, pb.PUSH_STATE_ABORTED):
        assert state in states
    assert [e.published.generation for e in events if e.HasField("published")] == [1]
    assert [e.removed_generation for e in events if e.WhichOneof("event") == "removed_generation"] == [1]
    assert all(event.time.seconds for event in events)


def test_watching_starts_with_the_present_and_tells_of_progress(caller: Caller) -> None:
    caller.push(ROWS)
    thread, events = collect(caller, "run", lambda event: event.published.epoch == 1)
    eventually(lambda: len(events), bool)
    caller.push(random_rows(2000, 64), epoch=1)
    thread.join(20)
    assert events[0].snapshot.newest.generation == 1
    progress = [event.progress for event in events if event.HasField("progress")]
    assert progress
    assert {each.epoch for each in progress} == {1}
    assert all(0 <= each.rows_done <= each.rows_total for each in progress)


def test_a_slow_watcher_gets_a_new_snapshot() -> None:
    import asyncio

    from nearkin_service.catalogue import EventHub
    from nearkin_service.values import GenerationRemoved

    async def watch() -> list[Any]:
        hub = EventHub()
        with hub.subscribe("run") as subscription:
            for number in range(3000):
                hub.publish("run", GenerationRemoved(number))
            hub.publish("other", GenerationRemoved(9))
            dropped = await subscription.next()
            hub.publish("run", GenerationRemoved(7))
            return [dropped, await subscription.next()]

    assert asyncio.run(watch()) == [None, GenerationRemoved(7)]


def test_server_info(caller: Caller) -> None:
    info = caller.stub.GetServerInfo(pb.GetServerInfoRequest())
    assert [(e.name, e.available, e.exact) for e in info.engines if e.name == "flat"] == [
        ("flat", True, True)
    ]
    assert list(info.devices) == ["cpu"]
    assert info.limits.max_message_bytes >= info.chunk_bytes >= 1 << 20
    assert info.limits.max_num_classes > 10**8
    assert info.version
    assert info.versions["grpcio"] == grpc.__version__


def test_health_overall_and_of_the_service(caller: Caller) -> None:
    stub = health_pb2_grpc.HealthStub(caller.channel)
    for name in ("", "nearkin.v1.NeighbourService"):
        reply = stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_a_client_without_our_stubs(caller: Caller) -> None:
    """As grpcurl does it: everything known of the protocol comes from reflection."""
    caller.push(ROWS)
    database = ProtoReflectionDescriptorDatabase(caller.channel)
    assert "nearkin.v1.NeighbourService" in database.get_services()
    service = DescriptorPool(database).FindServiceByName("nearkin.v1.NeighbourService")

    def types(method: str) -> tuple[str, Any, Any]:
        found = service.FindMethodByName(method)
        path = f"/{service.full_name}/{method}"
        return path, GetMessageClass(found.input_type), GetMessageClass(found.output_type)

    path, request, reply = types("Nearest")
    call = caller.channel.unary_unary(path, request.SerializeToString, reply.FromString)
    answer = MessageToDict(call(ParseDict({"run": "run", "classes": {"ids": [3]}, "k": 2}, request())))
    assert answer["rows"][0]["ids"] == brute_force(ROWS, 2)[3].tolist()

    path, request, reply = types("ReadTable")
    stream = caller.channel.unary_stream(path, request.SerializeToString, reply.FromString)
    first, *blocks = list(stream(ParseDict({"run": "run", "minEpoch": 0}, request())))
    assert first.header.row_count == 20
    ids = np.frombuffer(b"".join(each.block.payload for each in blocks), np.int32).reshape(20, 5)
    np.testing.assert_array_equal(ids, brute_force(ROWS, 5))
    assert json.dumps(MessageToDict(first))


def get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_http(start_service: Callable[..., Service]) -> None:
    service = start_service(http="127.0.0.1:0")
    caller = service.caller()
    caller.push(ROWS)
    refusal(lambda: caller.nearest([99]))
    address = service.server.http_address
    assert address is not None
    assert get(address, "/livez") == (200, "ok\n")
    assert get(address, "/readyz") == (200, "ok\n")
    assert get(address, "/other")[0] == 404
    status, text = get(address, "/metrics")
    assert status == 200
    for line in (
        "nearkin_push_bytes_total 320.0",
        "nearkin_generations_published_total 1.0",
        "nearkin_table_reads_total 1.0",
        'nearkin_errors_total{code="INVALID_ARGUMENT",method="Nearest"} 1.0',
        'nearkin_build_seconds_count{stage="total"} 1.0',
        "nearkin_runs 1.0",
        "nearkin_queued_builds 0.0",
        "nearkin_disk_free_bytes",
    ):
        assert line in text


def test_generations_survive_with_everything(start_service: Callable[..., Service]) -> None:
    service = start_service()
    caller = service.caller()
    for epoch in range(3):
        caller.push(random_rows(20, 4, seed=epoch), epoch, absent=[epoch])
    eventually(lambda: caller.generation(2).embeddings, lambda s: s == pb.EMBEDDINGS_STATE_KEPT)
    eventually(lambda: caller.generation(3).embeddings, lambda s: s == pb.EMBEDDINGS_STATE_KEPT)
    eventually(lambda: caller.generation(1).embeddings, lambda s: s == pb.EMBEDDINGS_STATE_DROPPED)
    before = caller.generations()
    tables = [caller.table(generation=number) for number in (1, 2, 3)]
    service.stop()
    caller = start_service().caller()
    assert caller.generations() == before
    for table in tables:
        again = caller.table(generation=table.generation.generation)
        np.testing.assert_array_equal(again.ids, table.ids)
        np.testing.assert_array_equal(again.scores, table.scores)
    assert caller.state(before[0].push_id).state == pb.PUSH_STATE_PUBLISHED
    assert caller.nearest([5], generation=3).rows[0].ids == tables[2].ids[5].tolist()
    caller.push(ROWS, epoch=3)
    assert caller.table().generation.generation == 4


@pytest.mark.parametrize("kind", [pb.PUSH_STATE_FAILED, pb.PUSH_STATE_ABORTED])
def test_how_a_push_ended_is_remembered(start_service: Callable[..., Service], kind: int) -> None:
    service = start_service()
    caller = service.caller()
    push_id = caller.begin(ROWS).push.push_id
    if kind == pb.PUSH_STATE_ABORTED:
        caller.stub.AbortPush(pb.AbortPushRequest(push_id=push_id))
    else:
        refusal(lambda: caller.write(push_id, np.zeros((20, 4), np.float32)))
    before = caller.state(push_id)
    service.stop()
    caller = start_service().caller()
    assert caller.state(push_id) == before
    assert refusal(lambda: caller.table(min_epoch=0)).code() is grpc.StatusCode.FAILED_PRECONDITION
    caller.push(ROWS)
