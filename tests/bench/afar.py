"""Clients of a service on this host that find it as those on other hosts do."""

from __future__ import annotations

from typing import Any

from nearkin_client import NeighbourClient
from nearkin_client.lane import Lane


class _FarLane(Lane):
    """By TCP, whatever door there is on this host."""

    def _leads_in(self, address: object) -> bool:
        return False


def from_afar(address: str, run: str) -> NeighbourClient:
    """A client that neither maps, nor takes the unix socket."""
    client = NeighbourClient(address, run=run, shared_memory=False)
    wire: Any = client._wire
    wire.lane = lambda offer: _FarLane(offer, wire.endpoint, wire._lane_sockets)
    return client
