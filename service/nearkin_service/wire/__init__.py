"""The gRPC face: requests become values, values become replies, errors become status codes.

No faiss, no files.
"""

from nearkin_service.wire.handlers import SERVICE_NAME, generic_handler
from nearkin_service.wire.lane import BulkLane
from nearkin_service.wire.reflection import Reflection
from nearkin_service.wire.servicer import behaviours
from nearkin_service.wire.status import refuser, to_status

__all__ = [
    "SERVICE_NAME",
    "BulkLane",
    "Reflection",
    "behaviours",
    "generic_handler",
    "refuser",
    "to_status",
]
