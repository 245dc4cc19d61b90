"""Where a call comes from, as far as its connection tells."""

from __future__ import annotations

import ipaddress
import socket
from enum import Enum, auto
from typing import Any
from urllib.parse import unquote

import grpc


class Origin(Enum):
    """Of a call."""

    SOCKET = auto()  # a unix socket: this host for certain
    HOST = auto()  # an address of this host: itself, or the near end of a tunnel from anywhere
    NETWORK = auto()

    @classmethod
    def of(cls, context: grpc.aio.ServicerContext[Any, Any]) -> Origin:
        """To be asked before the first `await`: gRPC crashes when asked about a connection that has gone."""
        kind, _, place = context.peer().partition(":")
        if kind == "unix":
            return cls.SOCKET
        host, _, _ = unquote(place).rpartition(":")
        return cls.HOST if _is_ours(host.strip("[]")) else cls.NETWORK


def _is_ours(host: str) -> bool:
    """Whether an address is one of this host's: nobody can listen on those of others."""
    try:
        ipaddress.ip_address(host)
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
        family, kind, _, _, place = found[0]  # a link-local address with the number of its interface
        with socket.socket(family, kind) as probe:
            probe.bind(place)
    except (OSError, ValueError):
        return False
    return True
