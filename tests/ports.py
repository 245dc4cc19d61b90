"""Ports for services that are started again, or that must say beforehand where they will be."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Of 127.0.0.1; free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
