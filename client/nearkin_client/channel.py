"""Where connections are made: addresses, channel options, credentials. Nothing else opens a channel."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from nearkin.tracing import trace_channel

from nearkin_client.errors import InvalidArgument, invalid

SERVICE_VARIABLE = "NEARKIN_SERVICE"
TOKEN_VARIABLE = "NEARKIN_TOKEN"  # noqa: S105 - the name of a variable
CA_VARIABLE = "NEARKIN_CA_CERTIFICATE"
CERTIFICATE_VARIABLE = "NEARKIN_CLIENT_CERTIFICATE"
KEY_VARIABLE = "NEARKIN_CLIENT_KEY"

StrPath = str | os.PathLike[str]

# Frames of 16 MiB and a large write buffer carry bulk bytes about four times as fast as the defaults;
# the defaults also wait up to two minutes before they look whether a restarted service is back.
_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.http2.max_frame_size", 16_777_215),
    ("grpc.http2.write_buffer_size", 64 << 20),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # what one attempt may take: three round trips of a bad line
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A line that was cut without a word looks like one on which nothing happens, for as long as a watcher
    # waits. The service allows a ping every 10 s.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 40_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # bulk streams get a connection of their own
)


@dataclass(frozen=True, slots=True)
class Certificates:
    """TLS as a client needs it; PEM files.

    Attributes:
        ca: whom to trust to say who the service is.
        certificate: who we are, for a service that asks (mutual TLS).
        key: the private key of `certificate`.
    """

    ca: Path
    certificate: Path | None = None
    key: Path | None = None

    @classmethod
    def resolve(
        cls, ca: StrPath | None, certificate: StrPath | None, key: StrPath | None
    ) -> Certificates | None:
        """Fill in what was not given from the environment; None: no TLS."""
        authority = ca or os.environ.get(CA_VARIABLE)
        mine = certificate or os.environ.get(CERTIFICATE_VARIABLE)
        secret = key or os.environ.get(KEY_VARIABLE)
        if bool(mine) != bool(secret):
            invalid("client_key", secret, "and client_certificate belong together: give both or neither")
        if not authority:
            if mine:
                invalid("ca_certificate", authority, "is needed for TLS with a client certificate")
            return None
        return cls(Path(authority), Path(mine) if mine else None, Path(secret) if secret else None)

    def credentials(self) -> grpc.ChannelCredentials:
        """InvalidArgument: a file cannot be read."""
        return grpc.ssl_channel_credentials(
            root_certificates=_pem("ca_certificate", self.ca),
            private_key=_pem("client_key", self.key),
            certificate_chain=_pem("client_certificate", self.certificate),
        )


def _pem(field_name: str, path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path is not None else None
    except OSError as error:
        invalid(field_name, str(path), f"cannot be read: {error.strerror}")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A service and how to be let in.

    Attributes:
        address: `unix:///path`, or `host:port`.
        token: sent as `authorization: Bearer <token>`, never shown.
        tls: for `host:port`; None: no TLS. Unix sockets need none.
    """

    address: str
    token: str | None = field(default=None, repr=False)
    tls: Certificates | None = None

    @classmethod
    def resolve(cls, address: StrPath | None, token: str | None, tls: Certificates | None = None) -> Endpoint:
        """Fill in what was not given from NEARKIN_SERVICE and NEARKIN_TOKEN."""
        given = os.fspath(address) if address is not None else os.environ.get(SERVICE_VARIABLE, "")
        if not given:
            raise InvalidArgument(
                f"no service address: give unix:///path/to.sock or host:port, or set {SERVICE_VARIABLE}",
                field="address",
            )
        return cls(_normalised(given), _sendable(token or os.environ.get(TOKEN_VARIABLE) or None), tls)

    @property
    def is_local(self) -> bool:
        """Whether the service is on this host for certain."""
        return self.address.startswith("unix:")

    def open_channel(self) -> grpc.Channel:
        """A new channel with a connection of its own. InvalidArgument: a certificate cannot be read."""
        if self.tls is not None and not self.is_local:
            channel = grpc.secure_channel(self.address, self.tls.credentials(), options=_OPTIONS)
        else:
            channel = grpc.insecure_channel(self.address, options=_OPTIONS)
        return trace_channel(channel)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What accompanies every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()


def _sendable(token: str | None) -> str | None:
    """InvalidArgument: what a header cannot carry, such as a line end that came along from a file."""
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise InvalidArgument(
            "token: it holds a space, a line end or another character that no token has; is all of it meant?",
            field="token",
        )
    return token


def _normalised(address: str) -> str:
    try:
        address.encode()
    except UnicodeEncodeError:  # of bytes that are no text; gRPC takes text alone
        invalid("address", address, "is not UTF-8")
    if address.startswith("unix:"):
        return address
    if address.startswith("/"):
        return f"unix://{address}"
    host, colon, port = address.rpartition(":")
    if "://" in address or not colon or not host or not (port.isascii() and port.isdigit()):
        invalid("address", address, "is not unix:///path/to.sock or host:port")
    return address


def socket_path(address: str) -> Path | None:
    """The file of a unix address, or None."""
    if not address.startswith("unix:"):
        return None
    return Path(address.removeprefix("unix:").removeprefix("//"))
