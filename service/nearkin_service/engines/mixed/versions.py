"""Which packages engine `mixed` computes with."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from importlib.util import find_spec

import numpy as np

from nearkin_service.engines.installed import faiss_version


@cache
def versions() -> dict[str, str]:
    """Package versions, for a generation's provenance."""
    found = {name: metadata.version(name) for name in ("numba", "torch") if find_spec(name)}
    return {"faiss": faiss_version(), "numpy": np.__version__, **found}
