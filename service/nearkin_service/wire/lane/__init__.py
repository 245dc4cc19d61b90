"""The bulk lane: a socket beside each address on which nothing but rows and tables moves.

What may move is agreed on by gRPC, which hands out a ticket for it; what happens to it is the same on either
way. gRPC for Python copies a received message three times while no other thread of the service can run; here
rows are received into a buffer that is used again and again, and tables are sent from the page cache.
"""

from nearkin_service.wire.lane.lane import BulkLane, shares
from nearkin_service.wire.lane.tickets import RowsGrant, TableGrant

__all__ = ["BulkLane", "RowsGrant", "TableGrant", "shares"]
