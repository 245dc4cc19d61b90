"""A test module run by several processes at once, as torchrun starts them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_together(module: str, *words: str, size: int = 2, seconds: float) -> str:
    """Runs `python -m module words…` in `size` processes; what they printed, once all have ended well."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)),
            *("-m", module, *words),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]
    return done.stdout
