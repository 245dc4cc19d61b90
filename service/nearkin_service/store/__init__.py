"""The data directory: what the service knows, as files. No grpc, no engines, no event loop.

`DataDirectory` is its only face. Its methods block; the service calls them from I/O threads.
"""

from nearkin_service.store.directory import DataDirectory
from nearkin_service.store.generation_files import IDS, SCORES, Finished
from nearkin_service.store.push_files import PushFiles
from nearkin_service.store.rows import as_bytes

__all__ = ["IDS", "SCORES", "DataDirectory", "Finished", "PushFiles", "as_bytes"]
