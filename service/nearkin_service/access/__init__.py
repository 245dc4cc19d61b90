"""Who may come in, and how far: tokens and their scopes, transport security, the gate before every call.

Knows grpc and the protocol's method names; knows nothing of runs, files or engines.
"""

from nearkin_service.access.gate import Gate
from nearkin_service.access.policy import OPEN, SCOPES, Scope
from nearkin_service.access.reach import reachable
from nearkin_service.access.tls import TlsFiles
from nearkin_service.access.tokens import TokenBook, TokenFile, TokenRecord

__all__ = [
    "OPEN",
    "SCOPES",
    "Gate",
    "Scope",
    "TlsFiles",
    "TokenBook",
    "TokenFile",
    "TokenRecord",
    "reachable",
]
