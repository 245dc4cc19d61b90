"""Older clients and newer services, and the reverse: within v1 they work together, or say what is lacking."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin_client import NeighbourClient
from nearkin_client.errors import Unimplemented
from nearkin_service.wire import catalogue

from tests.service.conftest import WAIT, Caller, Service, brute_force, message, random_rows

FIRST_STUBS = Path(__file__).with_name("fixtures") / "stubs_v1_first"
ROWS = random_rows(20, 6)

OLD_CLIENT = """
import json, sys
import grpc, numpy as np
from nearkin.v1 import neighbours_pb2 as pb
from nearkin.v1.neighbours_pb2_grpc import NeighbourServiceStub

assert not hasattr(pb, "PinGenerationRequest"), "these are not the first stubs"
stub = NeighbourServiceStub(grpc.insecure_channel(sys.argv[1]))
rows = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
begun = stub.BeginPush(pb.BeginPushRequest(
    run="old", epoch=4, num_classes=20, row_shape=[6], dtype=pb.DTYPE_FLOAT32, k=5, commit_when_complete=True,
    accept_shared_memory=True,
), timeout=30)
write = pb.WriteRowsRequest(push_id=begun.push.push_id, payload=rows.tobytes())
assert stub.WriteRows(iter([write]), timeout=30).complete
messages = list(stub.ReadTable(pb.ReadTableRequest(run="old", min_epoch=4), timeout=30))
ids = np.frombuffer(b"".join(each.block.payload for each in messages[1:]), np.int32).reshape(20, 5)
nearest = stub.Nearest(pb.NearestRequest(run="old", classes=pb.ClassIds(ids=[2])), timeout=30)
assert list(nearest.rows[0].ids) == ids[2].tolist()
assert stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=30).limits.max_k > 0
(run,) = stub.ListRuns(pb.ListRunsRequest(), timeout=30).runs
event = next(stub.WatchRun(pb.WatchRunRequest(run="old"), timeout=30))
assert event.snapshot.newest.epoch == run.newest.epoch == 4
print(json.dumps(ids.tolist()))
"""


def test_the_first_stubs_still_work(service: Service, tmp_path: Path) -> None:
    package = tmp_path / "stubs" / "nearkin" / "v1"
    package.mkdir(parents=True)
    for each in (package, package.parent):
        (each / "__init__.py").touch()
    for stub in FIRST_STUBS.iterdir():
        (package / stub.name.removesuffix(".txt")).write_text(stub.read_text())
    environment = os.environ | {"PYTHONPATH": str(package.parent.parent)}
    command = [sys.executable, "-c", OLD_CLIENT, service.server.addresses[0]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(json.loads(done.stdout), brute_force(ROWS, 5))


def test_unknown_fields_are_kept_quiet(caller: Caller) -> None:
    """What a newer client sends and this service does not know is passed over: field 1999, a string."""
    unknown = b"\xfa\x7c\x05later"
    channel: Any = caller.channel
    path = "/nearkin.v1.NeighbourService/"
    request = pb.BeginPushRequest(
        run="run", num_classes=20, row_shape=[6], dtype=pb.DTYPE_FLOAT32, k=5, commit_when_complete=True
    )
    raw = channel.unary_unary(path + "BeginPush")(request.SerializeToString() + unknown, timeout=WAIT)
    push_id = pb.BeginPushResponse.FromString(raw).push.push_id
    rows = unknown + message(push_id, ROWS, 0).SerializeToString()
    channel.stream_unary(path + "WriteRows")(iter([rows]), timeout=WAIT)
    np.testing.assert_array_equal(caller.table(min_epoch=0).ids, brute_force(ROWS, 5))


@pytest.mark.parametrize(
    ("feature", "call"),
    [
        ("pin", lambda client: client.pin(1)),
        (
            "base_generation",
            lambda client: client.push(ROWS, epoch=1, k=5, changed_rows=[3], base_generation=1),
        ),
        ("qaconv", lambda client: client.push(ROWS.reshape(20, 6, 1, 1), epoch=1, k=5, key="qaconv")),
    ],
    ids=["pin", "base_generation", "qaconv"],
)
def test_a_client_says_what_the_service_lacks(
    service: Service,
    caller: Caller,
    monkeypatch: pytest.MonkeyPatch,
    feature: str,
    call: Callable[[NeighbourClient], object],
) -> None:
    caller.push(ROWS)
    monkeypatch.setattr(catalogue, "_FEATURES", ())
    with (
        NeighbourClient(service.server.addresses[0], run="run") as client,
        pytest.raises(Unimplemented, match=f"does not have the feature '{feature}'"),
    ):
        call(client)
    (run,) = caller.stub.ListRuns(pb.ListRunsRequest(), timeout=WAIT).runs
    assert not [push for push in run.pushes if push.epoch == 1], "nothing was begun"


def test_a_method_that_does_not_exist_yet_is_unimplemented(caller: Caller) -> None:
    channel: Any = caller.channel
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/nearkin.v1.NeighbourService/Later")(b"", timeout=WAIT)
    error: Any = refused.value
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
