"""Clients of a service on this host that find it as those on other hosts do."""

from __future__ import annotations

from typing import Any

from nearkin.v1 import neighbours_pb2 as pb
from nearkin_client import NeighbourClient
from nearkin_client.lane import Lane


def from_afar(address: str, run: str) -> NeighbourClient:
    """A client that neither maps, nor takes the unix socket: it is offered what another host is."""
    client = NeighbourClient(address, run=run, shared_memory=False)
    wire: Any = client._wire

    def lane(offer: pb.BulkLane) -> Lane:
        offered = pb.BulkLane(ticket=offer.ticket, answer=offer.answer, doors=offer.doors)
        return Lane(offered, wire.endpoint, wire._lane_sockets)

    wire.lane = lane
    return client
