"""Where connections are made: addresses, channel options, credentials. Nothing else opens a channel."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from nearkin_client.errors import InvalidArgument, invalid

SERVICE_VARIABLE = "NEARKIN_SERVICE"
TOKEN_VARIABLE = "NEARKIN_TOKEN"  # noqa: S105 - the name of a variable

# Frames of 16 MiB and a large write buffer carry bulk bytes about four times as fast as the defaults;
# the defaults also wait up to two minutes before they look whether a restarted service is back.
_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.http2.max_frame_size", 16_777_215),
    ("grpc.http2.write_buffer_size", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # bulk streams get a connection of their own
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A service and how to be let in.

    Attributes:
        address: `unix:///path`, or `host:port`.
        token: sent as `authorization: Bearer <token>`, never shown.
    """

    address: str
    token: str | None = field(default=None, repr=False)

    @classmethod
    def resolve(cls, address: str | os.PathLike[str] | None, token: str | None) -> Endpoint:
        """Fill in what was not given from NEARKIN_SERVICE and NEARKIN_TOKEN."""
        given = os.fspath(address) if address is not None else os.environ.get(SERVICE_VARIABLE, "")
        if not given:
            raise InvalidArgument(
                f"no service address: give unix:///path/to.sock or host:port, or set {SERVICE_VARIABLE}",
                field="address",
            )
        return cls(_normalised(given), token or os.environ.get(TOKEN_VARIABLE) or None)

    @property
    def is_local(self) -> bool:
        """Whether the service is on this host for certain."""
        return self.address.startswith("unix:")

    def open_channel(self) -> grpc.Channel:
        """A new channel with a connection of its own."""
        return grpc.insecure_channel(self.address, options=_OPTIONS)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What accompanies every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


def _normalised(address: str) -> str:
    if address.startswith("unix:"):
        return address
    if address.startswith("/"):
        return f"unix://{address}"
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not host or not port.isdigit():
        invalid("address", address, "is not unix:///path/to.sock or host:port")
    return address


def socket_path(address: str) -> Path | None:
    """The file of a unix address, or None."""
    if not address.startswith("unix:"):
        return None
    return Path(address.removeprefix("unix:").removeprefix("//"))
