"""What a connection tells of where its caller is."""

from __future__ import annotations

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
