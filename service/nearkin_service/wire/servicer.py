"""All methods of nearkin.v1.NeighbourService, one object for each concern."""

from __future__ import annotations

from nearkin_service.operations import (
    Administering,
    Builds,
    Comparing,
    Core,
    Lending,
    Pushing,
    Reading,
    Searching,
    Writing,
)
from nearkin_service.wire.catalogue import CatalogueMethods
from nearkin_service.wire.lane import BulkLane
from nearkin_service.wire.nearest import NearestMethods
from nearkin_service.wire.pushes import PushMethods
from nearkin_service.wire.tables import TableMethods
from nearkin_service.wire.watch import WatchMethods


def behaviours(
    core: Core,
    builds: Builds,
    searching: Searching,
    *,
    pushing: Pushing,
    writing: Writing,
    lending: Lending,
    reading: Reading,
    lane: BulkLane,
) -> tuple[object, ...]:
    """Objects whose methods carry the protocol's names; each of those is in exactly one of them."""
    administering = Administering(core, builds, searching)
    return (
        PushMethods(core, pushing, writing, lending, lane),
        TableMethods(core, reading, lane),
        NearestMethods(core, reading, searching, Comparing(core)),
        CatalogueMethods(core, administering, reading),
        WatchMethods(administering),
    )
