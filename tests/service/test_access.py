"""Who may come in: tokens and their scopes, TLS, mutual TLS, addresses that other machines can reach."""

from __future__ import annotations

import hashlib
import json
import re
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from nearkin.v1 import neighbours_pb2 as pb
from nearkin.v1.neighbours_pb2_grpc import NeighbourServiceStub
from nearkin_client import NeighbourClient
from nearkin_client.errors import Unauthenticated, Unavailable
from nearkin_service.access import OPEN, SCOPES, Scope, TlsFiles, TokenBook, TokenFile
from nearkin_service.config import ServiceConfig
from nearkin_service.listening import Doors, check_address

from tests.service.conftest import WAIT, Authority, Caller, Service, code_of, messages, random_rows, refusal

Start = Callable[..., Service]
ROWS = random_rows(20, 6)
READ, WRITE, ADMIN = Scope.READ, Scope.WRITE, Scope.ADMIN


@dataclass
class Visitor:
    """The protocol over TCP with whatever token (or none)."""

    channel: grpc.Channel
    token: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def ask(self, method: str, request: Any) -> Any:
        stub: Any = NeighbourServiceStub(self.channel)
        answer = getattr(stub, method)(request, timeout=WAIT, metadata=self.metadata)
        return list(answer) if method == "ReadTable" else answer

    def outcome(self, method: str, request: Any) -> str:
        """ "OK", or the status code's name."""
        try:
            self.ask(method, request)
        except grpc.RpcError as error:
            return code_of(error).name
        return "OK"


@dataclass
class Guarded:
    """A service on TCP and on a unix socket, with its token file."""

    service: Service
    tokens: TokenFile
    channel: grpc.Channel

    def visitor(self, scope: Scope | None = None, *runs: str) -> Visitor:
        return Visitor(self.channel, self.tokens.create(scope, runs) if scope else "")


@pytest.fixture
def guarded(start_service: Start, tmp_path: Path) -> Iterator[Guarded]:
    tokens = TokenFile(tmp_path / "data" / "tokens.json")
    tokens.create(ADMIN)
    unix = f"unix://{tmp_path}/nearkin.sock"
    service = start_service(listen=(unix, "127.0.0.1:0"), http="127.0.0.1:0")
    service.caller().push(ROWS, run="faces")
    with grpc.insecure_channel(service.server.addresses[1]) as channel:
        yield Guarded(service, tokens, channel)


BEGIN = pb.BeginPushRequest(
    run="faces",
    epoch=9,
    num_classes=20,
    row_shape=[6],
    dtype=pb.DTYPE_FLOAT32,
    k=3,
    commit_when_complete=True,
)
CALLS: list[tuple[str, Any, Scope]] = [
    ("ReadTable", pb.ReadTableRequest(run="faces"), READ),
    ("Nearest", pb.NearestRequest(run="faces", classes=pb.ClassIds(ids=[1])), READ),
    ("ListRuns", pb.ListRunsRequest(), READ),
    ("GetRun", pb.GetRunRequest(run="faces"), READ),
    ("ListGenerations", pb.ListGenerationsRequest(run="faces"), READ),
    ("GetGeneration", pb.GetGenerationRequest(run="faces"), READ),
    ("GetServerInfo", pb.GetServerInfoRequest(), READ),
    ("BeginPush", BEGIN, WRITE),
    ("DeleteGeneration", pb.DeleteGenerationRequest(run="faces", generation=1), ADMIN),
    ("DeleteRun", pb.DeleteRunRequest(run="faces"), ADMIN),
]


def test_every_method_of_every_service_has_a_scope() -> None:
    methods = {
        f"/{service.full_name}/{method.name}"
        for service in (
            pb.DESCRIPTOR.services_by_name["NeighbourService"],
            reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
        )
        for method in service.methods
    }
    assert methods <= SCOPES.keys()
    assert not SCOPES.keys() & OPEN


@pytest.mark.parametrize(("method", "request_", "needed"), CALLS, ids=[call[0] for call in CALLS])
def test_each_scope_reaches_what_it_says_and_no_further(
    guarded: Guarded, method: str, request_: Any, needed: Scope
) -> None:
    assert guarded.visitor().outcome(method, request_) == "UNAUTHENTICATED"
    for scope in Scope:
        expected = "OK" if scope >= needed else "PERMISSION_DENIED"
        assert guarded.visitor(scope).outcome(method, request_) == expected


def test_a_token_for_one_run_sees_and_touches_only_that_one(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    local = guarded.service.caller()
    theirs = local.begin(ROWS, 1, run="animals").push.push_id
    one, other = guarded.visitor(ADMIN, "animals"), guarded.visitor(ADMIN, "faces", "plants")
    assert [run.run for run in one.ask("ListRuns", pb.ListRunsRequest()).runs] == ["animals"]
    assert [run.run for run in other.ask("ListRuns", pb.ListRunsRequest()).runs] == ["faces"]
    for method, request, _ in CALLS:
        if hasattr(request, "run"):
            assert one.outcome(method, request) == "PERMISSION_DENIED"
    for method, request in (
        ("GetPush", pb.GetPushRequest(push_id=theirs)),
        ("CommitPush", pb.CommitPushRequest(push_id=theirs)),
        ("AbortPush", pb.AbortPushRequest(push_id=theirs)),
        ("WriteRows", iter(messages(theirs, ROWS, 0, 5))),
    ):
        assert other.outcome(method, request) == "PERMISSION_DENIED"
    assert local.state(theirs).rows_stored == 0
    counted = guarded.service.server.core.metrics.errors.collect()
    assert {sample.labels["code"] for metric in counted for sample in metric.samples} == {"PERMISSION_DENIED"}
    assert not [each for each in caplog.records if each.levelname == "ERROR"]
    assert one.outcome("WriteRows", iter(messages(theirs, ROWS, 0, 5))) == "OK"


def test_pages_of_runs_name_no_run_that_a_token_does_not_reach(guarded: Guarded) -> None:
    local = guarded.service.caller()
    for run in ("animals", "birds", "plants"):
        local.begin(ROWS, run=run)
    visitor = guarded.visitor(READ, "plants", "birds")
    request, seen = pb.ListRunsRequest(page_size=1), []
    for _ in range(5):
        page = visitor.ask("ListRuns", request)
        seen.append([run.run for run in page.runs])
        assert page.next_page_token in ("", "birds", "plants")
        request.page_token = page.next_page_token
        if not page.next_page_token:
            break
    assert seen == [["birds"], ["plants"]]


def test_a_token_learns_the_health_of_its_own_runs_only(guarded: Guarded) -> None:
    guarded.service.caller().push(ROWS, run="animals")
    health = health_pb2_grpc.HealthStub(guarded.channel)
    metadata = guarded.visitor(READ, "faces").metadata

    def outcome(service: str) -> str:
        try:
            health.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT, metadata=metadata)
        except grpc.RpcError as error:
            return code_of(error).name
        return "OK"

    assert [outcome(name) for name in ("", "run/faces", "run/animals", "run/nobody")] == [
        "OK",
        "OK",
        "PERMISSION_DENIED",
        "PERMISSION_DENIED",
    ]


def test_tokens_are_taken_and_refused_without_a_restart(guarded: Guarded) -> None:
    visitor, request = guarded.visitor(READ), pb.ListRunsRequest()
    assert visitor.outcome("ListRuns", request) == "OK"
    guarded.tokens.revoke(visitor.token.split("_")[1])
    assert visitor.outcome("ListRuns", request) == "UNAUTHENTICATED"
    fresh = guarded.visitor(READ)
    assert fresh.outcome("ListRuns", request) == "OK"


@pytest.mark.parametrize("mishap", ["gone", "damaged", "empty"])
def test_a_token_file_that_is_lost_opens_no_door(guarded: Guarded, mishap: str) -> None:
    visitor, path = guarded.visitor(READ), guarded.tokens.path
    if mishap == "gone":
        path.unlink()
    else:
        path.write_text("{" if mishap == "damaged" else "")
    for each in (visitor, guarded.visitor()):
        assert each.outcome("ListRuns", pb.ListRunsRequest()) == "UNAUTHENTICATED"


@pytest.mark.parametrize("header", ["Bearer nonsense", "Basic Zm9v", "", "Bearer nk_00000000_" + "A" * 43])
def test_what_is_no_token_is_refused(guarded: Guarded, header: str) -> None:
    stub = NeighbourServiceStub(guarded.channel)
    error = refusal(
        lambda: stub.ListRuns(pb.ListRunsRequest(), timeout=WAIT, metadata=(("authorization", header),))
    )
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_unix_socket_asks_for_nothing_but_heeds_a_token(guarded: Guarded) -> None:
    local = guarded.service.caller()
    assert local.generation(run="faces").generation == 1
    reader = Visitor(local.channel, guarded.tokens.create(READ))
    assert reader.outcome("DeleteRun", pb.DeleteRunRequest(run="faces")) == "PERMISSION_DENIED"
    assert Visitor(local.channel, "nk_wrong").outcome("ListRuns", pb.ListRunsRequest()) == "UNAUTHENTICATED"
    path = guarded.service.server.addresses[0].removeprefix("unix://")
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600


def test_tokens_can_be_asked_for_on_unix_sockets_too(start_service: Start) -> None:
    caller = start_service(require_tokens=True).caller()
    assert refusal(caller.generations).code() is grpc.StatusCode.UNAUTHENTICATED


def test_probes_are_open_and_reflection_is_not(guarded: Guarded) -> None:
    health = health_pb2_grpc.HealthStub(guarded.channel)
    reply = health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT)
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    assert reflected(guarded.channel, "v1alpha") == "UNAUTHENTICATED"
    assert reflected(guarded.channel, "v1", guarded.visitor(READ).metadata) == "OK"


def reflected(channel: grpc.Channel, version: str, metadata: Any = ()) -> str:
    """How a reflection call of either version of that protocol ends."""
    call: Any = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol="nearkin.v1.NeighbourService")
    try:
        (reply,) = call(iter([asked]), timeout=WAIT, metadata=metadata)
    except grpc.RpcError as error:
        return code_of(error).name
    return "OK" if reply.file_descriptor_response.file_descriptor_proto else "empty"


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_answers_under_both_names(caller: Caller, version: str) -> None:
    assert reflected(caller.channel, version) == "OK"


def test_metrics_need_a_token_that_reaches_all_runs(guarded: Guarded) -> None:
    def status(path: str, token: str = "") -> int:
        request = urllib.request.Request(f"http://{guarded.service.server.http_address}{path}")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=WAIT) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code

    assert (status("/livez"), status("/readyz"), status("/metrics")) == (200, 200, 401)
    assert status("/metrics", guarded.visitor(READ, "faces").token) == 401
    assert status("/metrics", guarded.visitor(READ).token) == 200


def test_what_is_kept_and_what_is_logged_cannot_be_used_to_come_in(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = guarded.visitor(READ)
    secret = visitor.token.split("_", 2)[2]
    with caplog.at_level("DEBUG"):
        visitor.ask("ListRuns", pb.ListRunsRequest())
        wrong = Visitor(guarded.channel, visitor.token[:-1] + "!")
        error = refusal(lambda: wrong.ask("ListRuns", pb.ListRunsRequest()))
    kept = guarded.tokens.path.read_text()
    assert secret not in kept + caplog.text + str(error.details())
    assert hashlib.sha256(secret.encode()).hexdigest() in kept
    assert stat.S_IMODE(guarded.tokens.path.stat().st_mode) == 0o600
    assert secret not in repr(guarded.tokens.read())


def test_the_first_token_closes_the_door_while_the_service_runs(start_service: Start, tmp_path: Path) -> None:
    caller = start_service(listen=("127.0.0.1:0",)).caller()
    assert caller.stub.ListRuns(pb.ListRunsRequest()).runs == []
    TokenFile(tmp_path / "data" / "tokens.json").create(READ)
    error = refusal(lambda: caller.stub.ListRuns(pb.ListRunsRequest()))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_client_shows_its_token(guarded: Guarded) -> None:
    address, token = guarded.service.server.addresses[1], guarded.visitor(WRITE).token
    with NeighbourClient(address, run="faces", token=token) as client:
        client.push(ROWS, epoch=3, k=2)
        assert client.table(epoch=3).ids.shape == (20, 2)


# ------------------------------------------------------------------------------------------- the command


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nearkin_service", "token", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def test_tokens_from_the_command_line(tmp_path: Path) -> None:
    place = ("--data-dir", str(tmp_path))
    made = command("create", "--scope", "write", "--run", "faces", "--name", "rank 0", *place)
    assert re.fullmatch(r"nk_[0-9a-f]{8}_[\w-]{43}\n", made.stdout)
    listed = json.loads(command("list", "--json", *place).stdout)
    assert (listed["scope"], listed["runs"], listed["name"]) == ("write", ["faces"], "rank 0")
    found = TokenBook(tmp_path / "tokens.json").find(made.stdout.strip())
    assert found is not None
    assert found.token_id == listed["id"]
    assert command("revoke", listed["id"], *place).returncode == 0
    assert command("list", *place).stdout == ""
    assert TokenBook(tmp_path / "tokens.json").in_force  # no token is left, and the door stays shut


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "--scope", "root"), "scope 'root' is not read, write or admin"),
        (("create", "--scope", "read", "--run", "../x"), "does not match"),
        (("revoke", "12345678"), "there is no token"),
        (("list",), "there are no tokens"),
    ],
)
def test_wrong_uses_of_the_command_are_said(tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    done = command(*arguments, "--data-dir", str(tmp_path))
    assert done.returncode == 2
    assert said in done.stderr


# ----------------------------------------------------------------------------------------- addresses, TLS


@pytest.mark.parametrize(
    ("doors", "open_"),
    [
        (Doors(), False),
        (Doors(tokens=True), False),
        (Doors(tls=True), False),
        (Doors(tls=True, tokens=True), True),
        (Doors(tls=True, client_certificates=True), True),
        (Doors(insecure=True), True),
    ],
)
@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.7:1", "nearkin.example:1"])
def test_other_machines_are_let_near_only_if_they_are_asked_who_they_are(
    address: str, doors: Doors, open_: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if open_:
        check_address(address, doors)
        assert ("--insecure" in caplog.text) == doors.insecure
    else:
        with pytest.raises(ValueError, match="can be reached from other machines"):
            check_address(address, doors)


def test_tls_from_the_client_library(authority: Authority, start_service: Start) -> None:
    tls = TlsFiles(authority.file("service.pem"), authority.file("service.key"))
    address = start_service(listen=("127.0.0.1:0",), tls=tls).server.addresses[0]
    with NeighbourClient(address, run="faces", ca_certificate=authority.file("ca.pem")) as client:
        client.push(ROWS, epoch=0, k=3)
        assert len(client.table(epoch=0).ids) == 20
    error = refusal(Caller(address).generations)
    assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_rows_are_written_in_place_behind_tls_on_one_host(authority: Authority, start_service: Start) -> None:
    tls = TlsFiles(authority.file("service.pem"), authority.file("service.key"))
    address = start_service(listen=("127.0.0.1:0",), tls=tls).server.addresses[0]
    trusted = authority.file("ca.pem")
    with NeighbourClient(address, run="faces", shared_memory=True, ca_certificate=trusted) as client:
        client.push(ROWS, epoch=0, k=4)
        assert client.table(epoch=0, timeout=30).k == 4


def test_mutual_tls_turns_strangers_away(authority: Authority, start_service: Start) -> None:
    from nearkin_client.patience import Patience

    tls = TlsFiles(*(authority.file(name) for name in ("service.pem", "service.key", "ca.pem")))
    address = start_service(listen=("127.0.0.1:0",), tls=tls).server.addresses[0]
    known: dict[str, Any] = {
        "client_certificate": authority.file("client.pem"),
        "client_key": authority.file("client.key"),
    }
    ca = authority.file("ca.pem")
    with NeighbourClient(address, ca_certificate=ca, **known) as client:
        assert client.runs() == ()
    impatient = Patience(call=1.0, outage=0.3)
    with (
        NeighbourClient(address, ca_certificate=ca, patience=impatient) as stranger,
        pytest.raises(Unavailable, match="client certificate"),
    ):
        stranger.runs()


@pytest.mark.parametrize(
    ("certificate", "trusted"),
    [("service", "client.pem"), ("client", "ca.pem"), ("", "ca.pem")],
    ids=["of another authority", "of another host", "none"],
)
def test_a_client_says_at_once_whom_it_does_not_trust(
    authority: Authority, start_service: Start, certificate: str, trusted: str
) -> None:
    """A minute of trying would not change that."""
    files = (authority.file(f"{certificate}.pem"), authority.file(f"{certificate}.key"))
    tls = TlsFiles(*files) if certificate else None
    address = start_service(listen=("127.0.0.1:0",), tls=tls).server.addresses[0]
    with NeighbourClient(address, run="faces", ca_certificate=authority.file(trusted)) as client:
        for call in (client.runs, lambda: client.push(ROWS, epoch=0, k=3), lambda: client.table(epoch=0)):
            began = time.monotonic()
            with pytest.raises(Unauthenticated, match="ca_certificate") as caught:
                call()
            assert time.monotonic() - began < 15
            assert caught.value.field == "ca_certificate"


@pytest.mark.parametrize(("days", "warned"), [("-1", True), ("2", False)])
def test_a_certificate_that_is_out_of_date_is_named_at_the_start(
    authority: Authority, start_service: Start, caplog: pytest.LogCaptureFixture, days: str, warned: bool
) -> None:
    certificate = authority.signed(f"for-{days}-days", days)
    start_service(tls=TlsFiles(certificate, authority.file("service.key")), listen=("127.0.0.1:0",))
    assert (f"{certificate} has expired: clients will not trust this service" in caplog.text) is warned


def test_tls_needs_a_certificate_and_its_own_key(authority: Authority) -> None:
    with pytest.raises(ValueError, match="both --tls-certificate and --tls-key"):
        TlsFiles.given(authority.file("service.pem"), None, None)
    with pytest.raises(ValueError, match="cannot be used"):
        TlsFiles(authority.file("service.pem"), authority.file("client.key"))
    with pytest.raises(ValueError, match="is not a file"):
        TlsFiles(Path("/nowhere.pem"), authority.file("service.key"))


def test_the_token_file_is_in_the_data_directory_by_default(tmp_path: Path) -> None:
    config = ServiceConfig(tmp_path, ("127.0.0.1:0",))
    assert config.tokens == tmp_path / "tokens.json"


def test_a_new_data_directory_is_its_owners_alone(start_service: Start, tmp_path: Path) -> None:
    start_service()
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700


def test_nothing_that_a_service_makes_is_open_to_others(serve: Callable[..., Any], tmp_path: Path) -> None:
    """Also in a directory that was there before, and that everyone may enter."""
    data = tmp_path / "data"
    data.mkdir()
    data.chmod(0o755)
    serving = serve("--ready-file", str(tmp_path / "ready"))
    caller = serving.caller()
    for epoch in range(3):
        caller.push(ROWS, epoch)
    caller.begin(ROWS, 3)
    lent = caller.begin(ROWS, 3, accept_shared_memory=True, row_count=len(ROWS)).lent_rows.path
    assert Path(lent).is_relative_to(data)
    made = [path for path in tmp_path.rglob("*") if path != data and not path.name.endswith(".log")]
    assert len(made) > 20
    assert not [path for path in made if path.lstat().st_mode & 0o077]
