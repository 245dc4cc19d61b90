"""Which packages engine `mixed` computes with."""

from __future__ import annotations

from functools import cache
from importlib import metadata

import numpy as np

from nearkin_service.engines.installed import faiss_version


@cache
def versions(*, by_torch: bool = False) -> dict[str, str]:
    """Package versions, for a generation's provenance; torch's if it multiplied."""
    packages = ("numba", "torch") if by_torch else ("numba",)
    found = {name: metadata.version(name) for name in packages}
    return {"faiss": faiss_version(), "numpy": np.__version__, **found}
