"""Sparse scores beside plain PyTorch: `python -m tests.bench.matching [--quick] [--shape N] [--peer NAME]`.

Forward and backward, class gradient included; medians; both sides in this process, on the same cores.
Memory is how far the resident set rises above the inputs; *working* leaves out what the step returns, which
is mostly the gradient of the classes. *products*: the step's products, backward ones included, as a share of
what this machine's bfloat16 matrix product would do in that time.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from nearkin_trainer.matching import location_maxima
from torch import Tensor

from tests.bench import matching_peers as peers

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Shape:
    """B probes, k neighbours beside the own class, maps [C, H, W], N classes."""

    B: int
    k: int
    C: int
    H: int
    W: int
    N: int

    def __str__(self) -> str:
        return f"B={self.B} k={self.k} {self.C}x{self.H}x{self.W} N={self.N:,}"

    @property
    def products(self) -> float:
        """Floating-point operations of one step's products, forward and backward as matrix products."""
        return 3 * 2.0 * self.B * (1 + self.k) * (self.H * self.W) ** 2 * self.C


SHAPES = (
    Shape(32, 32, 512, 7, 7, 10_240),
    Shape(32, 256, 512, 7, 7, 10_240),
    Shape(16, 64, 128, 24, 8, 4_096),
)
QUICK = (Shape(4, 8, 64, 7, 7, 256), Shape(4, 8, 32, 24, 8, 128))
OURS_PER_ROUND = 3  # ours are short
DENSE = Shape(32, 256, 512, 7, 7, 10_240)
TARGETS = {"plain": (80, 20, 25), "gathered": (3, 5, 6), "dense": (250,)}


@dataclass(frozen=True)
class Inputs:
    """One step's tensors; a sample's classes are drawn at random, which shares the fewest rows.

    classes: the same memory as table, in the shape of maps.
    """

    probes: Tensor
    table: Tensor
    classes: Tensor
    candidates: Tensor
    weights: Tensor

    @staticmethod
    def of(shape: Shape) -> Inputs:
        torch.manual_seed(0)
        places = shape.H * shape.W
        table = torch.randn(shape.N, shape.C * places)
        return Inputs(
            torch.randn(shape.B, shape.C, places).requires_grad_(),
            table.requires_grad_(),
            table.detach().view(shape.N, shape.C, shape.H, shape.W).requires_grad_(),
            torch.randint(shape.N, (shape.B, 1 + shape.k)),
            torch.randn(shape.B, 1 + shape.k, 2 * places),
        )

    def clear(self) -> None:
        """Forget the gradients."""
        self.probes.grad = self.table.grad = self.classes.grad = None


def steps(shape: Shape, inputs: Inputs) -> dict[str, Step]:
    """What is measured, by name; each returns maxima that `measure` sends a gradient through."""
    probes = inputs.probes

    def ours() -> Tensor:
        maps = probes.view(shape.B, shape.C, shape.H, shape.W)
        return location_maxima(maps, inputs.classes, inputs.candidates)

    def dense() -> Tensor:
        every = peers.dense(probes, inputs.table)
        index = inputs.candidates[:, :, None].expand(-1, -1, every.shape[2])
        return every.gather(1, index)

    return {
        "ours": ours,
        "plain": lambda: peers.plain(probes, inputs.table, inputs.candidates),
        "gathered": lambda: peers.gathered(probes, inputs.table, inputs.candidates),
        "dense": dense,
    }


@dataclass(frozen=True)
class Measured:
    forward: float
    seconds: float
    peak_mib: float
    left_mib: float

    @property
    def working_mib(self) -> float:
        """Of the peak, what is not the result: gone when the step is over."""
        return self.peak_mib - self.left_mib


def once(step: Step, inputs: Inputs) -> Measured:
    """One step, from inputs without gradients."""
    inputs.clear()
    gc.collect()
    before = _reset_peak()
    started = time.perf_counter()
    found = step()
    forward = time.perf_counter() - started
    torch.autograd.backward(found, inputs.weights)
    total = time.perf_counter() - started
    return Measured(forward, total, _peak() - before, _status("VmRSS") - before)


def side_by_side(ours: Step, theirs: Step, inputs: Inputs, rounds: int) -> tuple[Measured, Measured]:
    """Medians of both, in turns, so that what else the machine does falls on both; a first turn warms up."""
    pairs = []
    for turn in range(rounds + (rounds > 1)):
        own = [once(ours, inputs) for _ in range(OURS_PER_ROUND)]
        other = once(theirs, inputs)
        if turn or rounds == 1:
            pairs.append((own, other))
    inputs.clear()
    return _median([one for own, _ in pairs for one in own]), _median([other for _, other in pairs])


def _median(found: list[Measured]) -> Measured:
    return Measured(
        statistics.median(one.forward for one in found),
        statistics.median(one.seconds for one in found),
        max(one.peak_mib for one in found),
        statistics.median(one.left_mib for one in found),
    )


def matmul_rate(dtype: torch.dtype, size: int) -> float:
    """Floating-point operations per second of this machine's matrix products: the best of five."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = min(_seconds(lambda: left @ right) for _ in range(5))
    return 2.0 * size**3 / best


def run(quick: bool, only: int | None = None, against: str | None = None) -> list[dict[str, object]]:
    """Measure, print a table, and return its rows; of all shapes and peers, or of one."""
    rate = matmul_rate(torch.bfloat16, 512 if quick else 2048)
    rows: list[dict[str, object]] = []
    for number, shape in enumerate(QUICK if quick else SHAPES):
        if only not in (None, number + 1):
            continue
        inputs = Inputs.of(shape)
        work = steps(shape, inputs)
        once(work["ours"], inputs)
        rounds = {"gathered": 3, "plain": 1}
        if shape == DENSE or quick:
            rounds["dense"] = 1
        for peer, count in rounds.items():
            if against not in (None, peer):
                continue
            ours, theirs = side_by_side(work["ours"], work[peer], inputs, count)
            targets = TARGETS[peer]
            target = None if quick else targets[min(number, len(targets) - 1)]
            rows.append(_row(shape, ours, peer, theirs, rate, target))
            _print(rows[-1], first=len(rows) == 1)
    return rows


def _row(
    shape: Shape, ours: Measured, peer: str, theirs: Measured, rate: float, target: float | None
) -> dict[str, object]:
    return {
        "name": "sparse scores, forward and backward",
        "shape": str(shape),
        "ours_seconds": ours.seconds,
        "ours_forward_seconds": ours.forward,
        "peer": peer,
        "peer_seconds": theirs.seconds,
        "peer_forward_seconds": theirs.forward,
        "ratio": theirs.seconds / ours.seconds,
        "target_ratio": target,
        "ours_extra_mib": ours.peak_mib,
        "peer_extra_mib": theirs.peak_mib,
        "memory_ratio": ours.peak_mib / max(theirs.peak_mib, 1e-9),
        "ours_working_mib": ours.working_mib,
        "peer_working_mib": theirs.working_mib,
        "share_of_matmul_peak": shape.products / ours.seconds / rate,
        "bf16_matmul_gflops": rate / 1e9,
    }


def _print(row: dict[str, object], *, first: bool) -> None:
    if first:
        print(f"bfloat16 matrix products here: {row['bf16_matmul_gflops']:.0f} GFLOP/s, {_threads()}")
        print(
            f"{'shape':34} {'peer':9} {'ours s':>8} {'peer s':>8} {'ratio':>8} {'target':>7}"
            f" {'ours MiB':>9} {'peer MiB':>9} {'memory':>7} {'working':>12} {'products':>9}"
        )
    target = "" if row["target_ratio"] is None else f"{row['target_ratio']}x"
    print(
        f"{row['shape']:34} {row['peer']:9} {row['ours_seconds']:8.4f} {row['peer_seconds']:8.3f}"
        f" {row['ratio']:7.1f}x {target:>7} {row['ours_extra_mib']:9.0f} {row['peer_extra_mib']:9.0f}"
        f" {row['memory_ratio']:7.3f} {row['ours_working_mib']:5.0f}/{row['peer_working_mib']:<6.0f}"
        f" {row['share_of_matmul_peak']:9.1%}",
        flush=True,
    )


def _threads() -> str:
    return f"{torch.get_num_threads()} threads"


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _reset_peak() -> float:
    """Start a new high-water mark; the resident set now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    return float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.matching", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast is it")
    parser.add_argument("--shape", type=int, choices=range(1, 1 + len(SHAPES)), help="only this one")
    parser.add_argument("--peer", choices=TARGETS, help="only beside this one")
    given = parser.parse_args()
    run(given.quick, given.shape, given.peer)


if __name__ == "__main__":
    main()
