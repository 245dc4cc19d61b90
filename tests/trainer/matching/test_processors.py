"""The loops as other processors get them, whatever this one has."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from nearkin_trainer.matching.cpu.instructions import HAS_AVX512

ROOT = Path(__file__).parents[3]
AVX2 = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+sse4.2,+avx,+avx2,+fma,+bmi,+bmi2,+lzcnt,+popcnt",
}
SCRIPT = """
import sys
import pytest
from nearkin_trainer.matching.cpu.instructions import HAS_AVX512, PROCESSOR
assert (PROCESSOR, HAS_AVX512) == ("haswell", False)
chosen = "cpu and (test_maxima_and_gradients or test_equal_locations)"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", chosen, sys.argv[1]]))
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64")
@pytest.mark.skipif(not HAS_AVX512, reason="the other tests run these loops here")
def test_sixteen_registers_of_eight_floats() -> None:
    # Tiles, stretches of channels and transposes are smaller than with AVX-512.
    command = [sys.executable, "-c", SCRIPT, "tests/trainer/matching/test_backends.py"]
    done = subprocess.run(
        command, check=False, cwd=ROOT, env=os.environ | AVX2, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
