"""What computes here: the processor, and the FAISS that is installed, with its GPUs."""

from __future__ import annotations

from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_DISTRIBUTIONS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")


def faiss_distributions() -> list[str]:
    """Installed distributions that provide the module `faiss`."""
    found = set(metadata.packages_distributions().get("faiss", ()))
    for name in _DISTRIBUTIONS:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        found.add(name)
    return sorted(found)


@cache
def load_faiss() -> Any:
    """The module `faiss`.

    Raises:
        RuntimeError: none or several distributions provide it.
    """
    found = faiss_distributions()
    if not found:
        raise RuntimeError("FAISS is not installed: pip install 'nearkin-service[cpu]' (or [gpu])")
    if len(found) > 1:
        raise RuntimeError(
            f"{', '.join(found)} all install the module faiss and overwrite each other; "
            "uninstall them all, then install exactly one"
        )
    import faiss

    return faiss


@cache
def faiss_version() -> str:
    """Distribution and version, such as "faiss-cpu 1.15.1"."""
    load_faiss()
    name = faiss_distributions()[0]
    return f"{name} {metadata.version(name)}"


@cache
def processor_flags() -> frozenset[str]:
    """Instruction sets of the processor, as Linux names them ("avx2"); none where it does not tell."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return frozenset()
    return frozenset(told.split())


def gpu_count() -> int:
    """GPUs that FAISS can use."""
    faiss = load_faiss()
    return int(faiss.get_num_gpus()) if hasattr(faiss, "GpuIndexFlatIP") else 0
