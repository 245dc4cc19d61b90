"""Each status code becomes one class, with the service's message and the field it blames."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status  # type: ignore[import-untyped]
from nearkin_client import NearkinError, NeighbourClient, Patience, Unavailable, Unimplemented, errors

from tests.client.fakes import fake_service

BAD_CODES = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK]


@pytest.mark.parametrize("code", BAD_CODES)
def test_every_code_has_a_class_over_a_real_socket(code: grpc.StatusCode) -> None:
    def refuse(_: bytes, context: grpc.ServicerContext) -> None:
        context.abort(code, f"because {code.name}")

    with (
        fake_service(GetServerInfo=refuse) as address,
        NeighbourClient(address, patience=Patience(outage=0.05)) as client,
        pytest.raises(errors.ERROR_OF_CODE[code], match=f"because {code.name}") as caught,
    ):
        client.server_info()
    assert isinstance(caught.value, NearkinError)
    assert caught.value.field is None


def test_the_field_of_a_bad_request_is_carried() -> None:
    def refuse(_: bytes, context: grpc.ServicerContext) -> None:
        violation = error_details_pb2.BadRequest.FieldViolation(field="k", description="too large")
        detail = AnyMessage()
        detail.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
        status = status_pb2.Status(code=3, message="k: 99 is too large", details=[detail])
        context.abort_with_status(rpc_status.to_status(status))

    with (
        fake_service(GetServerInfo=refuse) as address,
        NeighbourClient(address) as client,
        pytest.raises(errors.InvalidArgument, match="k: 99 is too large") as caught,
    ):
        client.server_info()
    assert caught.value.field == "k"


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    classes = [
        each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, NearkinError)
    ]
    for each in classes:
        assert each.__name__ in (errors.__doc__ or "")
        assert each is NearkinError or each.__bases__[0].__name__ in (errors.__doc__ or "")


def test_what_the_errors_also_are() -> None:
    assert issubclass(errors.InvalidArgument, ValueError)
    assert issubclass(errors.NotFound, LookupError)
    assert issubclass(errors.NotReadyInTime, TimeoutError)
    assert issubclass(errors.Unavailable, ConnectionError)
    assert str(errors.Unavailable("gone")) == "gone"


def test_nobody_there_is_unavailable_and_says_where() -> None:
    patience = Patience(outage=0.2)
    with (
        NeighbourClient("unix:///nowhere/nearkin.sock", run="r", patience=patience) as client,
        pytest.raises(Unavailable, match="cannot be reached"),
    ):
        client.generations()


def test_a_service_that_is_silent_is_said_to_be() -> None:
    """It is up, and does not answer: gRPC's own words would name neither it nor what was asked."""
    woken = threading.Event()

    def silent(_: bytes, __: grpc.ServicerContext) -> bytes:
        woken.wait(10)
        return b""

    with (
        fake_service(GetServerInfo=silent, DeleteRun=silent, ReadTable=silent, BeginPush=silent) as address,
        NeighbourClient(address, run="r") as client,
    ):
        calls: dict[str, Callable[[], object]] = {
            "asking": lambda: client.server_info(timeout=0.2),
            "deleting a run": lambda: client.delete_run("r", timeout=0.2),
            "generation 3": lambda: client.table(generation=3, timeout=0.2),
            "epoch 5": lambda: client.table(epoch=5, timeout=0.2),
            "epoch 6": lambda: client.push(
                np.eye(4, dtype=np.float32), epoch=6, k=2, timeout=0.2, commit=False
            ),
        }
        for asked, call in calls.items():
            with pytest.raises(errors.DeadlineExceeded, match=rf"{asked}.*did not answer within 0\.") as late:
                call()
            assert isinstance(late.value, errors.NotReadyInTime) == (asked == "epoch 5")
        woken.set()


def test_a_socket_that_is_not_ours_is_said_at_once() -> None:
    """gRPC's words where the operating system refuses; to root it refuses nothing, so they are said here."""

    def refuse(_: bytes, context: grpc.ServicerContext) -> None:
        context.abort(
            grpc.StatusCode.UNAVAILABLE,
            "failed to connect to all addresses; last error: FAILED_PRECONDITION: unix:/run/nearkin.sock: "
            "connect failed: addr: unix:/run/nearkin.sock error: Permission denied",
        )

    with (
        fake_service(GetServerInfo=refuse) as address,
        NeighbourClient(address, patience=Patience(outage=1e6, call=1e6)) as client,
        pytest.raises(errors.PermissionDenied, match="may not open the service's unix socket"),
    ):
        client.server_info()


def test_a_missing_method_is_unimplemented() -> None:
    with fake_service() as address, NeighbourClient(address) as client, pytest.raises(Unimplemented):
        client.server_info()


def test_a_closed_client_says_so() -> None:
    client = NeighbourClient("127.0.0.1:9", run="r")
    client.close()
    client.close()
    with pytest.raises(errors.Cancelled, match="closed"):
        client.runs()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"epoch": -1, "k": 2}, "epoch"),
        ({"epoch": 0, "k": 0}, "k"),
        ({"epoch": 0, "k": 6}, "k"),
        ({"epoch": 0, "k": 2, "row_start": 3}, "num_classes"),
        ({"epoch": 0, "k": 2, "row_start": 3, "num_classes": 8}, "row_start"),
        ({"epoch": 0, "k": 2, "row_start": -1, "num_classes": 8}, "row_start"),
        ({"epoch": 0, "k": 1, "num_classes": 1}, "num_classes"),
        ({"epoch": 0, "k": 2, "key": "round"}, "key"),
        ({"epoch": 0, "k": 2, "absent": [6]}, "absent"),
        ({"epoch": 0, "k": 2, "absent": [0.5]}, "absent"),
        ({"epoch": 0, "k": 2, "timeout": 0}, "timeout"),
        ({"epoch": 0, "k": 2, "changed_rows": [1], "base_generation": 2**63}, "base_generation"),
        ({"epoch": 0, "k": 2, "changed_rows": [1], "base_generation": -1}, "base_generation"),
        ({"epoch": 2**63, "k": 2}, "epoch"),
        (
            {"epoch": 0, "k": 2, "changed_rows": np.array([1, "x"], object), "base_generation": 1},
            "changed_rows",
        ),
        ({"epoch": 0, "k": 2, "absent": [1, "x", None]}, "absent"),
    ],
)
def test_wrong_arguments_are_caught_before_anything_is_sent(arguments: dict[str, object], field: str) -> None:
    rows = np.ones((6, 3), np.float32)
    with NeighbourClient("127.0.0.1:9", run="r") as client, pytest.raises(errors.InvalidArgument) as caught:
        client.push(rows, **arguments)  # type: ignore[arg-type]
    assert caught.value.field == field


@pytest.mark.parametrize("run", ["", "Faces", "-x", "a/b", "../up", "x" * 65])
def test_run_names(run: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="run"):
        NeighbourClient("127.0.0.1:9", run=run)


@pytest.mark.parametrize("address", ["nowhere", "http://host:1", "host:", ":1", "host:x"])
def test_addresses(address: str) -> None:
    with pytest.raises(errors.InvalidArgument, match="address"):
        NeighbourClient(address, run="r")


def test_the_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEARKIN_SERVICE", raising=False)
    with pytest.raises(errors.InvalidArgument, match="NEARKIN_SERVICE"):
        NeighbourClient(run="r")
    monkeypatch.setenv("NEARKIN_SERVICE", "/run/nearkin.sock")
    with NeighbourClient(run="r") as client:
        assert client.address == "unix:///run/nearkin.sock"


def test_a_token_is_sent_and_never_shown() -> None:
    seen: list[object] = []

    def note(_: bytes, context: grpc.ServicerContext) -> bytes:
        seen.extend(value for key, value in context.invocation_metadata() if key == "authorization")
        return b""

    with fake_service(GetServerInfo=note) as address, NeighbourClient(address, token="s3cret") as client:
        client.server_info()
        assert "s3cret" not in repr(client)
    assert seen == ["Bearer s3cret"]
