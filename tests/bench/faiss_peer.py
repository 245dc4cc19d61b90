"""FAISS flat in a process of its own, so that it can be given kernels that its OpenBLAS would not choose.

The OpenBLAS in the FAISS wheel falls back to SSE on processors that it does not know; which kernels it takes
is decided when it is loaded, by `OPENBLAS_CORETYPE`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_WIDE_KERNELS = "SKYLAKEX"


class Peer:
    """Times searches of one set of keys in its process."""

    def __init__(self, process: Any, folder: Path) -> None:
        self._process, self._folder = process, folder

    def load(self, keys: NDArray[np.float32]) -> None:
        """These are searched from now on."""
        np.save(self._folder / "keys.npy", keys)
        self._ask("load")

    def search(self, k: int) -> float:
        """Seconds of building the index and searching all keys in it."""
        return float(self._ask(k))

    def _ask(self, what: object) -> Any:
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def with_wide_kernels() -> Iterator[Peer | None]:
    """FAISS with its AVX-512 kernels; None where the processor has none, or the environment chose already."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    if "avx512bw" not in flags or "OPENBLAS_CORETYPE" in os.environ:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __name__, folder]
        environment = os.environ | {"OPENBLAS_CORETYPE": _WIDE_KERNELS}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            try:
                yield Peer(process, Path(folder))
            finally:
                process.terminate()


def _answer(folder: Path) -> None:
    from tests.bench.tables_peers import faiss_flat

    keys = np.empty((0, 0), np.float32)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked == "load":
            keys = np.load(folder / "keys.npy")
        began = time.perf_counter()
        if asked != "load":
            faiss_flat(keys, int(asked))
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    _answer(Path(sys.argv[1]))
