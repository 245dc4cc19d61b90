"""What people may import, and that importing it stays cheap."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import nearkin_client


def test_all_is_the_public_surface() -> None:
    public = {
        name
        for name, value in vars(nearkin_client).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public == set(nearkin_client.__all__)


def test_importing_brings_neither_torch_nor_faiss_nor_the_service() -> None:
    script = "import nearkin_client, nearkin_client.cli, nearkin_client.local, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "faiss", "nearkin_service", "pytest"} & set(loaded.split())
