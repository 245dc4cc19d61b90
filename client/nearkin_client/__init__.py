"""Push class embeddings to a nearkin service and read neighbour tables back.

    from nearkin_client import NeighbourClient

    with NeighbourClient("unix:///run/nearkin.sock", run="faces") as nearkin:
        nearkin.push(embeddings[lo:hi], epoch=3, row_start=lo, num_classes=N, k=64)
        table = nearkin.table(epoch=3, timeout=60)

`nearkin_client.local` starts a private service, `nearkin_client.testing` one for your own tests.
"""

from nearkin_client.client import NeighbourClient
from nearkin_client.errors import (
    AlreadyExists,
    Cancelled,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NearkinError,
    NotFound,
    NotReadyInTime,
    PermissionDenied,
    PushFailed,
    ResourceExhausted,
    ServiceInternalError,
    ServiceNotInstalled,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from nearkin_client.patience import Patience
from nearkin_client.values import (
    NO_NEIGHBOUR,
    BuildProgress,
    ClassChange,
    Comparison,
    EngineInfo,
    Generation,
    GenerationPublished,
    GenerationRemoved,
    NearestClasses,
    NeighbourTable,
    Push,
    PushChanged,
    Recall,
    Retention,
    Run,
    RunEvent,
    RunRemoved,
    RunSnapshot,
    ServerInfo,
)

__all__ = [
    "NO_NEIGHBOUR",
    "AlreadyExists",
    "BuildProgress",
    "Cancelled",
    "ClassChange",
    "Comparison",
    "DataLoss",
    "DeadlineExceeded",
    "EngineInfo",
    "FailedPrecondition",
    "Generation",
    "GenerationPublished",
    "GenerationRemoved",
    "InvalidArgument",
    "NearestClasses",
    "NearkinError",
    "NeighbourClient",
    "NeighbourTable",
    "NotFound",
    "NotReadyInTime",
    "Patience",
    "PermissionDenied",
    "Push",
    "PushChanged",
    "PushFailed",
    "Recall",
    "ResourceExhausted",
    "Retention",
    "Run",
    "RunEvent",
    "RunRemoved",
    "RunSnapshot",
    "ServerInfo",
    "ServiceInternalError",
    "ServiceNotInstalled",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
]
