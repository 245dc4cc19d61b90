"""What each method asks of its caller. A method that is not listed here is refused to everyone."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum


class Scope(IntEnum):
    """How far a token reaches; each scope includes those before it."""

    READ = 1  # tables, queries, the catalogue
    WRITE = 2  # pushes
    ADMIN = 3  # removing and pinning

    @classmethod
    def named(cls, name: str) -> Scope:
        """ValueError: no such scope."""
        try:
            return cls[name.upper()]
        except KeyError:
            raise ValueError(f"scope {name!r} is not read, write or admin") from None

    @property
    def label(self) -> str:
        return self.name.lower()


_SERVICE = "/nearkin.v1.NeighbourService/"
_BY_SCOPE = {
    Scope.READ: (
        "ReadTable",
        "WatchRun",
        "Nearest",
        "ListRuns",
        "GetRun",
        "ListGenerations",
        "GetGeneration",
        "CompareGenerations",
        "GetServerInfo",
        "GetPush",
    ),
    Scope.WRITE: ("BeginPush", "WriteRows", "CommitPush", "AbortPush"),
    Scope.ADMIN: ("DeleteRun", "DeleteGeneration", "PinGeneration"),
}

# Reflection tells what the published protocol file tells; with tokens in force it is still not for strangers.
_REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")

SCOPES: Mapping[str, Scope] = {
    **{_SERVICE + name: scope for scope, names in _BY_SCOPE.items() for name in names},
    **{f"/{service}/ServerReflectionInfo": Scope.READ for service in _REFLECTION},
}
"""Full method name -> the scope it needs."""

OPEN = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
"""Open to whoever can connect: probes carry no secrets. Only the overall state is; a run's needs READ."""
