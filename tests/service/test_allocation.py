"""Freed message buffers stay with the process that serves."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import resource
from nearkin_service.allocation import keep_message_buffers
assert keep_message_buffers()
bytearray(4 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    bytearray(4 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_buffers_that_come_and_go_need_no_new_pages() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1024, "fifty buffers of 1024 pages each"
