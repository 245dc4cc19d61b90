"""Where tables are built: on the CPU or on GPUs, and whether FAISS is right there."""

from __future__ import annotations

import logging
from functools import cache

import numpy as np

from nearkin_service.engines.flat import FlatIndex
from nearkin_service.engines.installed import faiss_version, gpu_count

log = logging.getLogger("nearkin.engines")


@cache
def resolve_device(wanted: str) -> str:
    """The device that "auto", "cpu" or "cuda" means here: "cpu" or "cuda".

    It is checked by a small search, and logged with the reason.

    Raises:
        ValueError: the name is unknown, or it is "cuda" and FAISS has no GPU.
        RuntimeError: the check's result is wrong.
    """
    device, why = _choose(wanted)
    _check_search(device)
    log.info("device %s for %s: %s", device, faiss_version(), why)
    return device


def _choose(wanted: str) -> tuple[str, str]:
    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: {wanted!r} is not one of auto, cpu, cuda")
    gpus = gpu_count()
    if wanted == "cuda" and not gpus:
        raise ValueError(
            f"device: cuda was asked for, but {faiss_version()} sees no GPU; install nearkin-service[gpu] "
            "in place of [cpu] on a machine with one, or use --device auto or cpu"
        )
    if wanted == "cpu":
        return "cpu", "asked for"
    if wanted == "cuda":
        return "cuda", f"asked for; FAISS sees {gpus}"
    if gpus:
        return "cuda", f"auto; FAISS sees {gpus} GPU"
    return "cpu", "auto; FAISS sees no GPU"


def _check_search(device: str) -> None:
    """FAISS next to a mismatching CUDA or OpenMP library can return wrong neighbours rather than fail."""
    keys_MD = np.random.default_rng(7).standard_normal((200, 24), dtype=np.float32)
    index = FlatIndex(len(keys_MD), keys_MD.shape[1], device)
    index.keys_MD[:] = keys_MD
    index.ready()
    scores_QC, positions_QC = index.search(keys_MD[:50], 5)
    truth_QM = keys_MD[:50] @ keys_MD.T
    expected_QC = np.argsort(-truth_QM, axis=1)[:, :5]
    right = np.array_equal(positions_QC, expected_QC) and np.allclose(
        scores_QC, np.take_along_axis(truth_QM, expected_QC, axis=1), atol=1e-4
    )
    if not right:
        raise RuntimeError(
            f"{faiss_version()} on {device} returned wrong neighbours in the start-up check; "
            "its libraries do not fit this machine: reinstall it, or use --device cpu"
        )
