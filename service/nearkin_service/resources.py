"""What this machine, or this container, lets the process have."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_CGROUPS, _OURS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def memory_bytes() -> int:
    """Of the machine, or of the container or unit if that has less."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_granted()])


def _granted() -> Iterator[int]:
    """What our control groups, of version 1 or 2, and those around them may have."""
    with suppress(OSError):
        for line in _OURS.read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if not controllers:
                yield from _limits(_CGROUPS, place, "memory.max")
            elif "memory" in controllers.split(","):
                yield from _limits(_CGROUPS / "memory", place, "memory.limit_in_bytes")


def _limits(root: Path, place: str, name: str) -> Iterator[int]:
    inner = root / place.lstrip("/")  # seen from outside a container, if it has no name space of its own
    for group in (inner, *inner.parents):
        if group.is_relative_to(root):
            with suppress(OSError, ValueError):  # not here, or "max"
                yield int((group / name).read_text(encoding="ascii"))


def allow_many_connections() -> None:
    """As many descriptors as the system grants: idle connections must not use up those of files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
