"""How a service is set up: frozen, checked when made, nothing read from anywhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nearkin_service.access import TlsFiles
from nearkin_service.resources import memory_bytes
from nearkin_service.values import MAX_INT32, MAX_INT64, Retention

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
MESSAGE_ROOM = 64 * KIB
"""What gRPC takes beyond `max_message_bytes`: a row as large as that comes with a header."""
_MOST_IO_THREADS = 256
_LEAST = {"max_message_bytes": 64 * KIB, "min_free_disk_bytes": 0}
_MOST = dict.fromkeys(("max_message_bytes", "max_row_bytes"), MAX_INT32 - MESSAGE_ROOM)
"""Of other bytes what int64 holds, else int32: the protocol's."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one caller may ask for. Reported by GetServerInfo under the same names."""

    max_message_bytes: int = 16 * MIB
    max_num_classes: int = 200_000_000
    max_row_bytes: int = 16 * MIB
    max_push_bytes: int = 4 * TIB
    max_k: int = 100_000
    max_runs: int = 1_000
    max_generations_per_run: int = 100_000
    max_open_pushes: int = 64
    max_open_pushes_per_run: int = 4
    max_nearest_queries: int = 8_192
    max_waiting_readers: int = 10_000
    min_free_disk_bytes: int = 256 * MIB
    max_memory_bytes: int = field(default_factory=memory_bytes)
    max_run_bytes: int = 4 * TIB
    max_waiting_readers_per_run: int = 5_000
    max_stream_idle_seconds: int = 300
    max_table_streams: int = 128

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value, least = getattr(self, name), _LEAST.get(name, 1)
            most = _MOST.get(name, MAX_INT64 if name.endswith("_bytes") else MAX_INT32)
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}; it must be in {least}..{most}")
        if self.max_row_bytes > self.max_message_bytes:
            raise ValueError("max_row_bytes is above max_message_bytes: such a row could never be sent")


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """Everything that `nearkin-serve` can be told.

    Attributes:
        data_dir: where everything lies that must survive.
        listen: addresses, `unix:///path` or `host:port`; port 0 picks a free one.
        engine: what "auto" in a push means here; "auto" leaves it to the engines.
        device: "auto", "cpu" or "cuda".
        target_recall: what approximate engines tune themselves to, in (0, 1].
        keep_embeddings: embeddings of how many generations are kept when a push does not say.
        chunk_bytes: payload size per message that suits this service; None: 4 MiB, or all that one may have.
        io_threads: threads that check and store rows and read tables.
        searcher_memory_bytes: opened generations kept ready for `Nearest`, together.
        bulk_port: where the bulk lane of a `host:port` listens; 0: any free port, None: no lane at all.
        http: `host:port` of /metrics, /livez and /readyz, or None.
        health: where gRPC's health is served once more, on threads of its own, or None.
        drain_seconds: how long a stop waits for builds and readers.
        insecure: whether other machines may be let in unasked, or asked for a token in clear text.
        tls: certificates for the addresses that are not unix sockets; None: no TLS.
        token_file: who may do what; None: `tokens.json` in the data directory. In force once it exists.
        require_tokens: ask for a token always, on unix sockets too.
    """

    data_dir: Path
    listen: tuple[str, ...]
    engine: str = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    target_recall: float = 0.99
    keep_embeddings: int = 2
    chunk_bytes: int | None = None
    io_threads: int = 4
    searcher_memory_bytes: int = 4 * GIB
    bulk_port: int | None = 0
    http: str | None = None
    health: str | None = None
    drain_seconds: float = 30.0
    insecure: bool = False
    tls: TlsFiles | None = None
    token_file: Path | None = None
    require_tokens: bool = False
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not self.listen:
            raise ValueError("listen: at least one address is needed")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device: {self.device!r} is not auto, cpu or cuda")
        if not 0 < self.target_recall <= 1:
            raise ValueError(f"target_recall is {self.target_recall}; it must be above 0 and at most 1")
        if self.keep_embeddings < 1:
            raise ValueError(f"keep_embeddings is {self.keep_embeddings}; it must be at least 1")
        if not 1 <= self.io_threads <= _MOST_IO_THREADS:
            raise ValueError(f"io_threads is {self.io_threads}; it must be in 1..{_MOST_IO_THREADS}")
        if not 64 * KIB <= self.suiting_bytes <= self.limits.max_message_bytes:
            raise ValueError(f"chunk_bytes is {self.chunk_bytes}; it must be in 64 KiB..max_message_bytes")
        if self.bulk_port is not None and not 0 <= self.bulk_port <= 65535:
            raise ValueError(f"bulk_port is {self.bulk_port}; it must be in 0..65535")
        if not 0 <= self.drain_seconds < math.inf:
            raise ValueError(f"drain_seconds is {self.drain_seconds}; it must be a number and not negative")

    @property
    def suiting_bytes(self) -> int:
        return self.chunk_bytes or min(4 * MIB, self.limits.max_message_bytes)

    @property
    def tokens(self) -> Path:
        return self.token_file or self.data_dir / "tokens.json"

    def retention(self, asked: Retention) -> Retention:
        """What a push asked for, with the service's defaults in place."""
        keep = asked.keep_embeddings or self.keep_embeddings
        return Retention(keep, asked.keep_tables, asked.keep_every)
