"""`python -m tests.fuzz TARGET [libFuzzer options]`; without a target: each for NEARKIN_FUZZ_SECONDS (60).

What it finds is written to the current directory as `crash-…`; once mended, it goes into corpus/TARGET.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["nearkin", "nearkin_service"]):
    from tests.fuzz import targets

CORPUS = Path(__file__).with_name("corpus")
DIRECTORIES = ("data_directory", "snapshot")
"""Three bytes are one change to one of twenty files: many more than these leave nothing sound to look at."""
SECONDS_EACH = int(os.environ.get("NEARKIN_FUZZ_SECONDS", "60"))
MEMORY = Path("/dev/shm")
"""Where files need not reach a disk: a data directory flushes every one."""


def every_target() -> int:
    """Each in a process of its own, as libFuzzer wants it; the number of those that found something."""
    found = 0
    for name in targets.TARGETS:
        print(f"== {name}", flush=True)
        command = [sys.executable, "-m", "tests.fuzz", name, f"-max_total_time={SECONDS_EACH}"]
        found += subprocess.run(command, check=False).returncode != 0
    return found


def fuzz(name: str, options: list[str]) -> None:
    """New inputs go to a folder that is thrown away; the committed ones are where it starts from."""
    logging.disable(logging.CRITICAL)
    if MEMORY.is_dir():
        tempfile.tempdir = str(MEMORY)
    longest = 60 if name in DIRECTORIES else 512
    with tempfile.TemporaryDirectory() as grown:
        atheris.Setup(
            [sys.argv[0], grown, str(CORPUS / name), f"-max_len={longest}", *options], targets.TARGETS[name]
        )
        atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(every_target())
    fuzz(sys.argv[1], sys.argv[2:])
