"""What a connection tells of where its caller is."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from nearkin_service.wire.origin import Origin


class Context:
    def __init__(self, peer: str) -> None:
        self._peer = peer

    def peer(self) -> str:
        return self._peer


@pytest.mark.parametrize(
    ("peer", "origin"),
    [
        ("unix:", Origin.SOCKET),
        ("unix:/run/nearkin.sock", Origin.SOCKET),
        ("ipv4:127.0.0.1:43210", Origin.HOST),
        ("ipv4:127.9.8.7:1", Origin.HOST),
        ("ipv6:%5B::1%5D:43210", Origin.HOST),
        ("ipv6:[::1]:43210", Origin.HOST),
        ("ipv6:%5B::ffff:127.0.0.1%5D:43210", Origin.HOST),
        ("ipv4:203.0.113.9:80", Origin.NETWORK),
        ("ipv6:%5B2001:db8::9%5D:80", Origin.NETWORK),
        ("ipv6:%5B::ffff:203.0.113.9%5D:80", Origin.NETWORK),
        ("ipv6:%5Bfe80::1%25nowhere%5D:1", Origin.NETWORK),
        ("ipv4:", Origin.NETWORK),
        ("", Origin.NETWORK),
        ("vsock:2:1", Origin.NETWORK),
    ],
)
def test_of_an_address(peer: str, origin: Origin) -> None:
    context: Any = Context(peer)
    assert Origin.of(context) is origin


def link_local() -> list[tuple[str, int]]:
    """Addresses of this host that need the number of their interface."""
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        return []
    found = [line.split() for line in lines]
    return [(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(each[0])), int(each[1], 16)) for each in found]


def test_a_link_local_address_is_one_of_this_host_on_its_own_interface() -> None:
    ours = [(host, number) for host, number in link_local() if host.startswith("fe80")]
    if not ours:
        pytest.skip("no link-local address here")
    host, number = ours[0]
    here: Any = Context(f"ipv6:%5B{host}%25{number}%5D:43210")
    elsewhere: Any = Context(f"ipv6:%5Bfe80::1:2:3:4%25{number}%5D:43210")
    assert Origin.of(here) is Origin.HOST
    assert Origin.of(elsewhere) is Origin.NETWORK
