"""A real service on real sockets: in this process (`service`), or as a process to be killed (`serve`)."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import crc32c
import grpc
import ml_dtypes
import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb
from nearkin.v1.neighbours_pb2_grpc import NeighbourServiceStub
from nearkin_service import engines
from nearkin_service.config import Limits, ServiceConfig
from nearkin_service.operations import Engines
from nearkin_service.server import NeighbourServer
from numpy.typing import NDArray

os.environ.setdefault("OMP_NUM_THREADS", "1")

DTYPES: dict[pb.DType.ValueType, Any] = {
    pb.DTYPE_FLOAT32: np.float32,
    pb.DTYPE_FLOAT16: np.float16,
    pb.DTYPE_BFLOAT16: ml_dtypes.bfloat16,
}
WAIT = 30.0
T = TypeVar("T")
ANY_LENGTH = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),  # services of these tests die and come back at once
    ("grpc.min_reconnect_backoff_ms", 2_000),  # what an attempt to connect may take; the pause is above
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass
class Caller:
    """The protocol as a client would use it, with short names for what tests do all the time."""

    address: str
    channel: grpc.Channel = field(init=False)
    stub: NeighbourServiceStub = field(init=False)

    def __post_init__(self) -> None:
        self.channel = grpc.insecure_channel(self.address, options=ANY_LENGTH)
        self.stub = NeighbourServiceStub(self.channel)

    def begin(self, rows: NDArray[Any], epoch: int = 0, **changes: Any) -> pb.BeginPushResponse:
        """BeginPush of these rows ([N, D] or [N, C, H, W] in a wire dtype) with any field given instead."""
        dtype = next(code for code, kind in DTYPES.items() if rows.dtype == kind)
        arguments: dict[str, Any] = {
            "run": "run",
            "epoch": epoch,
            "num_classes": len(rows),
            "row_shape": rows.shape[1:],
            "dtype": dtype,
            "k": min(5, len(rows) - 1),
            "commit_when_complete": True,
        }
        return self.stub.BeginPush(pb.BeginPushRequest(**arguments | changes), timeout=WAIT)

    def write(
        self, push_id: str, rows: NDArray[Any], start: int = 0, step: int | None = None
    ) -> pb.WriteRowsResponse:
        return self.stub.WriteRows(iter(messages(push_id, rows, start, step or len(rows))), timeout=WAIT)

    def vouch(self, push_id: str, rows: NDArray[Any], start: int = 0) -> pb.Push:
        """CommitPush of these rows alone."""
        part, crc = pb.RowRange(start=start, count=len(rows)), crc32c.crc32c(rows.tobytes())
        request = pb.CommitPushRequest(push_id=push_id, rows_crc32c=crc, part=part)
        return self.stub.CommitPush(request, timeout=WAIT)

    def push(self, rows: NDArray[Any], epoch: int = 0, **changes: Any) -> str:
        """A whole epoch, waited for."""
        push_id = self.begin(rows, epoch, **changes).push.push_id
        self.write(push_id, rows)
        self.table(run=changes.get("run", "run"), min_epoch=epoch)
        return push_id

    def table(self, **request: Any) -> Table:
        arguments: dict[str, Any] = {"run": "run", "with_scores": True} | request
        return read_table(self.stub.ReadTable(pb.ReadTableRequest(**arguments), timeout=WAIT))

    def nearest(self, classes: Sequence[int] = (), **request: Any) -> pb.NearestResponse:
        if "vectors" not in request:
            request["classes"] = pb.ClassIds(ids=classes)
        return self.stub.Nearest(pb.NearestRequest(**{"run": "run"} | request), timeout=WAIT)

    def state(self, push_id: str) -> pb.Push:
        return self.stub.GetPush(pb.GetPushRequest(push_id=push_id), timeout=WAIT)

    def ended(self, push_id: str) -> pb.Push:
        """The push once it is no longer open or being built."""
        return eventually(
            lambda: self.state(push_id),
            lambda push: push.state not in (pb.PUSH_STATE_OPEN, pb.PUSH_STATE_BUILDING),
        )

    def generation(self, number: int = 0, run: str = "run") -> pb.Generation:
        return self.stub.GetGeneration(pb.GetGenerationRequest(run=run, generation=number), timeout=WAIT)

    def generations(self, run: str = "run") -> list[pb.Generation]:
        request = pb.ListGenerationsRequest(run=run)
        return list(self.stub.ListGenerations(request, timeout=WAIT).generations)


def errors_of(caplog: pytest.LogCaptureFixture, logger: str = "") -> list[str]:
    """What a logger, and those below it, say at ERROR."""
    theirs = [record for record in caplog.records if record.name.startswith(logger)]
    return [record.getMessage() for record in theirs if record.levelno >= logging.ERROR]


@dataclass(frozen=True)
class Table:
    header: pb.TableHeader
    ids: NDArray[np.int32]
    scores: NDArray[np.float32] | None

    @property
    def generation(self) -> pb.Generation:
        return self.header.generation


def messages(push_id: str, rows: NDArray[Any], start: int, step: int) -> list[pb.WriteRowsRequest]:
    """The rows as WriteRows messages of `step` rows; the first row is number `start`."""
    return [message(push_id, rows[at : at + step], start + at) for at in range(0, len(rows), step)]


def message(push_id: str, rows: NDArray[Any], start: int) -> pb.WriteRowsRequest:
    payload = rows.tobytes()
    return pb.WriteRowsRequest(
        push_id=push_id, row_start=start, crc32c=crc32c.crc32c(payload), payload=payload
    )


def read_table(stream: Iterator[pb.ReadTableResponse]) -> Table:
    """Puts a stream together, insisting on everything the protocol promises of it."""
    header = next(stream).header
    columns: dict[int, list[pb.TableBlock]] = {pb.TABLE_COLUMN_IDS: [], pb.TABLE_COLUMN_SCORES: []}
    for response in stream:
        block = response.block
        assert crc32c.crc32c(block.payload) == block.crc32c
        assert len(block.payload) == block.row_count * header.k * 4
        columns[block.column].append(block)
        assert block.column == pb.TABLE_COLUMN_SCORES or not columns[pb.TABLE_COLUMN_SCORES]
    ids = _joined(columns[pb.TABLE_COLUMN_IDS], header, np.int32)
    scores = _joined(columns[pb.TABLE_COLUMN_SCORES], header, np.float32) if header.with_scores else None
    return Table(header, ids, scores)


def _joined(blocks: list[pb.TableBlock], header: pb.TableHeader, dtype: Any) -> NDArray[Any]:
    at = header.row_start
    for block in blocks:
        assert block.row_start == at
        at += block.row_count
    assert at == header.row_start + header.row_count
    return np.frombuffer(b"".join(block.payload for block in blocks), dtype).reshape(-1, header.k)


def brute_force(rows: NDArray[Any], k: int, absent: Sequence[int] = ()) -> NDArray[np.int64]:
    """The neighbour table by definition, in float64; ties by the lower id."""
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    with np.errstate(invalid="ignore"):
        unit = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    scores = unit @ unit.T
    np.fill_diagonal(scores, -np.inf)
    scores[:, list(absent)] = -np.inf
    ids: NDArray[np.int64] = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    ids[np.take_along_axis(scores, ids, axis=1) == -np.inf] = -1
    ids[list(absent)] = -1
    return ids


def eventually(look: Callable[[], T], until: Callable[[T], bool], seconds: float = WAIT) -> T:
    """What `look` returns once it satisfies `until`."""
    deadline = time.monotonic() + seconds
    while not until(found := look()):
        assert time.monotonic() < deadline, f"still {found!r} after {seconds} s"
        time.sleep(0.01)
    return found


def code_of(error: Any) -> grpc.StatusCode:
    """Of a grpc.RpcError, which does not say that it is a grpc.Call as well."""
    code = error.code()
    assert isinstance(code, grpc.StatusCode)
    return code


def refusal(call: Callable[[], Any]) -> grpc.Call:
    """The error that a call must end in."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    assert isinstance(error, grpc.Call)
    return error


@dataclass
class Service:
    """A service in this process, on its own event loop thread."""

    config: ServiceConfig
    engines: Engines
    server: NeighbourServer = field(init=False)
    callers: list[Caller] = field(default_factory=list)

    def start(self) -> Service:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._run(self._make())
        except BaseException:  # a service that does not start leaves no thread behind, or pytest never ends
            self._end_loop()
            raise
        return self

    async def _make(self) -> None:
        self.server = NeighbourServer(self.config, self.engines, "cpu")
        try:
            await self.server.start()
        except BaseException:  # a process would end with it, and leave the data directory to the next one
            self.server.core.directory.close()
            raise

    def _run(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(WAIT)

    def stop(self) -> None:
        """Once; again does nothing."""
        if self._loop.is_closed():
            return
        for caller in self.callers:
            caller.channel.close()
        self._run(self.server.stop())
        self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def caller(self) -> Caller:
        self.callers.append(Caller(self.server.addresses[0]))
        return self.callers[-1]


@pytest.fixture
def start_service(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Starts services with any part of the configuration changed, and stops them at the end."""
    started: list[Service] = []

    def start(using: Engines = engines, limits: Limits | None = None, **changes: Any) -> Service:
        settings: dict[str, Any] = {
            "data_dir": tmp_path / "data",
            "listen": (f"unix://{tmp_path}/nearkin.sock",),
            "drain_seconds": 5.0,
            "limits": limits or Limits(),
        }
        service = Service(ServiceConfig(**settings | changes), using).start()
        started.append(service)
        return service

    yield start
    for service in started:
        service.stop()


@pytest.fixture
def service(start_service: Callable[..., Service]) -> Service:
    return start_service()


@pytest.fixture
def caller(service: Service) -> Caller:
    return service.caller()


@dataclass
class Serving:
    """A `nearkin-serve` process."""

    process: subprocess.Popen[str]
    address: str
    log: Path

    def kill(self) -> None:
        """As the machine's out-of-memory killer would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT)

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT)

    def caller(self) -> Caller:
        return Caller(self.address)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Serving]]:
    """Starts `nearkin-serve` on this test's data directory; what is still running at the end is killed."""
    started: list[Serving] = []

    def start(*options: str) -> Serving:
        address, log = f"unix://{tmp_path}/serve.sock", tmp_path / f"serve-{len(started)}.log"
        command = [sys.executable, "-m", "nearkin_service", "--data-dir", str(tmp_path / "data")]
        with log.open("w") as errors:
            process = subprocess.Popen(
                [*command, "--listen", address, "--device", "cpu", *options],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        serving = Serving(process, address, log)
        started.append(serving)
        assert process.stdout is not None
        assert "ready" in process.stdout.readline(), log.read_text()
        return serving

    yield start
    for serving in started:
        if serving.process.poll() is None:
            serving.kill()
        assert serving.process.stdout is not None
        serving.process.stdout.close()


def random_rows(count: int, *shape: int, seed: int = 0, dtype: Any = np.float32) -> NDArray[Any]:
    rows: NDArray[Any] = np.random.default_rng(seed).standard_normal((count, *shape)).astype(dtype)
    return rows


@dataclass(frozen=True)
class Authority:
    """A certificate authority with a service's and a client's certificate."""

    folder: Path

    def make(self) -> Authority:
        self._openssl("req", "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca")
        for who, name in (("service", "IP:127.0.0.1"), ("client", "DNS:client")):
            self._openssl("req", "-keyout", f"{who}.key", "-out", f"{who}.csr", "-subj", f"/CN={who}")
            extension = self.folder / f"{who}.ext"
            extension.write_text(f"subjectAltName={name}\n")
            files = ("-in", f"{who}.csr", "-out", f"{who}.pem", "-extfile", str(extension))
            self._run("x509", "-req", *files, "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
        return self

    def signed(self, name: str, days: str) -> Path:
        """The service's certificate, good for so many days from now."""
        files = ("-in", "service.csr", "-out", f"{name}.pem", "-extfile", "service.ext")
        self._run("x509", "-req", *files, "-CA", "ca.pem", "-CAkey", "ca.key", "-days", days)
        return self.file(f"{name}.pem")

    def _openssl(self, *arguments: str) -> None:
        self._run(*arguments, "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")

    def _run(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, capture_output=True, check=True)

    def file(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make certificates with")
    return Authority(tmp_path_factory.mktemp("certificates")).make()
