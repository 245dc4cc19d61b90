"""Loops compiled by this process and loops that an earlier one left on disk: the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = """
import hashlib
import torch
from nearkin_trainer.matching import location_maxima
torch.set_num_threads(1)
digest = hashlib.sha256()
for channels, side in ((16, 2), (16, 4), (64, 7), (33, 3)):
    draw = torch.Generator().manual_seed(1)
    shape = channels, side, side
    probes, classes = (torch.randn(n, *shape, generator=draw, requires_grad=True) for n in (8, 12))
    maxima = location_maxima(probes, classes, torch.randint(-1, 12, (8, 6), generator=draw), "cpu")
    maxima.backward(torch.randn(maxima.shape, generator=draw))
    for tensor in (maxima, probes.grad, classes.grad.to_dense()):
        digest.update(tensor.detach().numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.soak  # half a minute of compiling
def test_the_first_process_computes_what_the_next_ones_do(tmp_path: Path) -> None:
    """A job that compiled the loops, and its continuation that did not, are one job."""

    def computed() -> str:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", SCRIPT]
        return subprocess.run(
            command, check=True, cwd=ROOT, env=environment, capture_output=True
        ).stdout.decode()

    first = computed()
    assert [*tmp_path.rglob("*.nbc")]
    assert computed() == first
