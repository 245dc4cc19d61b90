"""What the service takes for this machine's memory: that of its container or unit, if there is less."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from nearkin_service import resources

MIB = 1 << 20
NO_LIMIT = 9_223_372_036_854_771_712
"""As version 1 writes it."""


@pytest.mark.parametrize(
    ("ours", "files", "granted"),
    [
        ("0::/", {"memory.max": 64 * MIB}, 64),
        ("0::/", {"memory.max": "max"}, None),
        ("0::/", {}, None),
        ("0::/a/b", {"a/memory.max": 48 * MIB, "a/b/memory.max": "max"}, 48),
        ("0::/a/b", {"a/memory.max": 48 * MIB, "a/b/memory.max": 32 * MIB}, 32),
        ("0::/../outside", {"memory.max": 64 * MIB}, 64),
        ("5:cpu:/\n4:memory:/docker/1", {"memory/memory.limit_in_bytes": 16 * MIB}, 16),
        ("4:hugetlb,memory:/a\n0::/", {"memory/a/memory.limit_in_bytes": 16 * MIB}, 16),
        ("4:memory:/a", {"memory/a/memory.limit_in_bytes": NO_LIMIT}, None),
        (None, {"memory.max": 64 * MIB}, None),
    ],
)
def test_memory_is_what_the_control_group_grants(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ours: str | None,
    files: dict[str, object],
    granted: int | None,
) -> None:
    groups = tmp_path / "cgroup"
    for name, content in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(f"{content}\n")
    if ours is not None:
        (tmp_path / "self").write_text(ours + "\n")
    monkeypatch.setattr(resources, "_CGROUPS", groups)
    monkeypatch.setattr(resources, "_OURS", tmp_path / "self")
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert resources.memory_bytes() == (physical if granted is None else granted * MIB)
