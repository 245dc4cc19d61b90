"""A bad network line: real packets, lost, delayed and held up on their way between two network namespaces.

    python -m tests.badline LOSS DELAY_MS JITTER_MS [SEED]

Makes a namespace for the service and two TUN devices, prints `ready NAMESPACE SERVICE_ADDRESS`, and passes
the packets of one device on to the other. Lines on stdin: `cut` (nothing passes any more), `mend`,
`loss 0.1`, `delay 50 20`. Ends, and takes everything away, when stdin does. Needs root, iproute2 and
/dev/net/tun.

Where the kernel has netem the same could be had from `tc`; this needs nothing but TUN.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MTU = 1500
_WAITING = 4096
"""Packets on their way in one direction; what comes then is lost, as in any router."""


def _tun(name: str) -> int:
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return descriptor


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass
class Weather:
    """How bad the line is just now; times in seconds."""

    loss: float
    delay: float
    jitter: float
    cut: bool = False


@dataclass
class _Direction:
    """Packets from one device to the other. They keep their order, as on one line."""

    source: int
    sink: int
    weather: Weather
    chance: random.Random
    waiting: list[tuple[float, int, bytes]] = field(default_factory=list)
    count: int = 0
    last_due: float = 0.0

    def take(self, now: float) -> None:
        while True:
            try:
                packet = os.read(self.source, _MTU + 100)
            except BlockingIOError:
                return
            weather = self.weather
            if weather.cut or self.chance.random() < weather.loss or len(self.waiting) >= _WAITING:
                continue
            due = now + max(0.0, weather.delay + self.chance.uniform(-weather.jitter, weather.jitter))
            self.last_due = max(self.last_due, due)
            self.count += 1
            heapq.heappush(self.waiting, (self.last_due, self.count, packet))

    def give(self, now: float) -> None:
        while self.waiting and self.waiting[0][0] <= now:
            packet = heapq.heappop(self.waiting)[2]
            try:
                os.write(self.sink, packet)
            except OSError:  # full, or the other end is being taken away: lost
                continue


def _pass_packets(here: int, there: int, weather: Weather, seed: int) -> None:
    ways = [
        _Direction(here, there, weather, random.Random(seed)),
        _Direction(there, here, weather, random.Random(seed + 1)),
    ]
    while True:
        now = time.monotonic()
        due = min((way.waiting[0][0] for way in ways if way.waiting), default=now + 1.0)
        ready, _, _ = select.select([here, there, sys.stdin], [], [], max(0.0, due - now))
        if sys.stdin in ready and not _obey(sys.stdin.readline(), weather):
            return
        now = time.monotonic()
        for way in ways:
            way.take(now)
            way.give(now)


def _obey(line: str, weather: Weather) -> bool:
    match line.split():
        case []:
            return False
        case ["cut"]:
            weather.cut = True
        case ["mend"]:
            weather.cut = False
        case ["loss", loss]:
            weather.loss = float(loss)
        case ["delay", delay, jitter]:
            weather.delay, weather.jitter = float(delay) / 1e3, float(jitter) / 1e3
    return True


def main(loss: float, delay_ms: float, jitter_ms: float, seed: int = 0) -> None:
    tag, net = f"nk{os.getpid()}", random.SystemRandom().randrange(1 << 14)
    near, far = (f"10.{77 + (net >> 13)}.{net >> 6 & 127}.{(net & 63) * 4 + host}" for host in (1, 2))
    here, there = _tun(f"{tag}a"), _tun(f"{tag}b")
    _ip("netns", "add", tag)
    try:
        _ip("addr", "add", f"{near}/30", "dev", f"{tag}a")
        _ip("link", "set", f"{tag}a", "up", "mtu", str(_MTU))
        _ip("link", "set", f"{tag}b", "netns", tag)
        _ip("-n", tag, "addr", "add", f"{far}/30", "dev", f"{tag}b")
        _ip("-n", tag, "link", "set", f"{tag}b", "up", "mtu", str(_MTU))
        _ip("-n", tag, "link", "set", "lo", "up")
        print("ready", tag, far, flush=True)
        _pass_packets(here, there, Weather(loss, delay_ms / 1e3, jitter_ms / 1e3), seed)
    finally:
        _ip("netns", "del", tag)


class BadLine:
    """A line that runs in a process of its own.

    Attributes:
        namespace: where the service has to run: `ip netns exec NAMESPACE …`.
        host: the service's address, as seen from here.
    """

    def __init__(self, process: subprocess.Popen[str], namespace: str, host: str) -> None:
        self._process, self.namespace, self.host = process, namespace, host

    def tell(self, order: str) -> None:
        """`cut`, `mend`, `loss 0.1`, `delay 50 20`."""
        assert self._process.stdin is not None
        self._process.stdin.write(order + "\n")
        self._process.stdin.flush()


@contextmanager
def bad_line(loss: float, delay_ms: float, jitter_ms: float, seed: int = 0) -> Iterator[BadLine]:
    """PermissionError: this process may not make one here."""
    command = [sys.executable, "-m", "tests.badline", *map(str, (loss, delay_ms, jitter_ms, seed))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = process.stdout.readline().split()
        if not said:
            raise PermissionError(process.communicate()[1][-300:])
        try:
            yield BadLine(process, said[1], said[2])
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)


if __name__ == "__main__":
    main(float(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:5]))
