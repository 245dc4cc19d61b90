"""Sparse scores beside plain PyTorch: `python -m tests.bench.matching [--quick] [--shape N] [--peer NAME]`.

Forward and backward, class gradient included; medians; both sides in this process, on the same cores.
Memory is how far the resident set rises above the inputs in the first step of a process of its own, so that
neither side finds memory that an earlier step left it; *working* leaves out what the step returns, which is
mostly the gradient of the classes. *forward*: the forward products as a share of what this machine's float32
matrix product would do in the time of the forward pass; *step*: those of the whole step, backward as products
too, in the time of the step.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from nearkin_trainer.matching import location_maxima
from torch import Tensor

from tests.bench import matching_peers as peers
from tests.bench import resident

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
        """Floating-point operations of the forward products; as products, backward takes twice as many."""
        return 2.0 * self.B * (1 + self.k) * (self.H * self.W) ** 2 * self.C


SHAPES = (
    Shape(32, 32, 512, 7, 7, 10_240),
    Shape(32, 256, 512, 7, 7, 10_240),
    Shape(16, 64, 128, 24, 8, 4_096),
)
SMALL = Shape(2, 2, 32, 3, 3, 16)
QUICK = (Shape(4, 8, 64, 7, 7, 256), Shape(4, 8, 32, 24, 8, 128))
OURS_PER_ROUND = 3  # ours are short
DENSE = Shape(32, 256, 512, 7, 7, 10_240)
TARGETS = {"plain": (80, 20, 25), "gathered": (3, 5, 6), "dense": (250,), "dense at once": (250,)}


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

    def dense(block: int) -> Tensor:
        every = peers.dense(probes, inputs.table, block)
        index = inputs.candidates[:, :, None].expand(-1, -1, every.shape[2])
        return every.gather(1, index)

    return {
        "ours": ours,
        "plain": lambda: peers.plain(probes, inputs.table, inputs.candidates),
        "gathered": lambda: peers.gathered(probes, inputs.table, inputs.candidates),
        "dense": lambda: dense(peers.DENSE_BLOCK),
        "dense at once": lambda: dense(shape.N),
    }


@dataclass(frozen=True)
class Taken:
    """Seconds of the forward pass, and of the whole step."""

    forward: float
    step: float


@dataclass(frozen=True)
class Memory:
    """MiB above the inputs: the most during a step, and what its results hold."""

    peak: float
    left: float

    @property
    def working(self) -> float:
        """Gone when the step is over."""
        return self.peak - self.left


def once(step: Step, inputs: Inputs) -> Taken:
    """One step, from inputs without gradients."""
    inputs.clear()
    gc.collect()
    started = time.perf_counter()
    found = step()
    forward = time.perf_counter() - started
    torch.autograd.backward(found, inputs.weights)
    return Taken(forward, time.perf_counter() - started)


def side_by_side(ours: Step, theirs: Step, inputs: Inputs, rounds: int) -> tuple[Taken, Taken]:
    """Medians of both, in turns, so that what else the machine does falls on both; a first turn warms up."""
    pairs = []
    for turn in range(rounds + (rounds > 1)):
        own = [once(ours, inputs) for _ in range(OURS_PER_ROUND)]
        other = once(theirs, inputs)
        if turn or rounds == 1:
            pairs.append((own, other))
    inputs.clear()
    return _median([one for own, _ in pairs for one in own]), _median([other for _, other in pairs])


def _median(found: list[Taken]) -> Taken:
    return Taken(
        statistics.median(one.forward for one in found), statistics.median(one.step for one in found)
    )


def first_step(shape: Shape, name: str) -> Memory:
    """In this process, which has not taken a step of that size before."""
    once(steps(SMALL, small := Inputs.of(SMALL))[name], small)
    small.clear()
    inputs = Inputs.of(shape)
    step = steps(shape, inputs)[name]
    resident.settled()
    before = resident.reset_peak()
    once(step, inputs)
    return Memory(resident.peak() - before, resident.resident() - before)


def memory_of(shape: Shape, name: str) -> Memory:
    """As `first_step`, in a process of its own."""
    asked = json.dumps({"shape": asdict(shape), "name": name})
    command = [sys.executable, "-m", "tests.bench.matching", "--memory", asked]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Memory(**json.loads(answer.splitlines()[-1]))


def matmul_rate(dtype: torch.dtype, size: int) -> float:
    """Floating-point operations per second of this machine's matrix products: the best of five."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    best = min(_seconds(lambda: left @ right) for _ in range(5))
    return 2.0 * size**3 / best


def run(quick: bool, only: int | None = None, against: str | None = None) -> list[dict[str, object]]:
    """Measure, print a table, and return its rows; of all shapes and peers, or of one."""
    rates = {dtype: matmul_rate(dtype, 512 if quick else 2048) for dtype in (torch.float32, torch.bfloat16)}
    print(
        ", ".join(f"{dtype}: {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items()), "of matrix products"
    )
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
        if (shape == DENSE and against == "dense at once") or quick:
            rounds["dense at once"] = 1  # only when asked for: it takes 14 GiB
        for peer, count in rounds.items():
            if against not in (None, peer):
                continue
            ours, theirs = side_by_side(work["ours"], work[peer], inputs, count)
            targets = TARGETS[peer]
            row = _row(shape, ours, peer, theirs, rates[torch.float32])
            row["target_ratio"] = None if quick else targets[min(number, len(targets) - 1)]
            rows.append(row | _memory_row(memory_of(shape, "ours"), memory_of(shape, peer)))
            _print(rows[-1], first=len(rows) == 1)
    return rows


def _row(shape: Shape, ours: Taken, peer: str, theirs: Taken, rate: float) -> dict[str, object]:
    return {
        "name": "sparse scores, forward and backward",
        "shape": str(shape),
        "ours_seconds": ours.step,
        "ours_forward_seconds": ours.forward,
        "peer": peer,
        "peer_seconds": theirs.step,
        "peer_forward_seconds": theirs.forward,
        "ratio": theirs.step / ours.step,
        "forward_share_of_matmul": shape.products / ours.forward / rate,
        "step_share_of_matmul": 3 * shape.products / ours.step / rate,
        "matmul_gflops": rate / 1e9,
    }


def _memory_row(ours: Memory, theirs: Memory) -> dict[str, object]:
    return {
        "ours_extra_mib": ours.peak,
        "peer_extra_mib": theirs.peak,
        "memory_ratio": ours.peak / theirs.peak,
        "ours_working_mib": ours.working,
        "peer_working_mib": theirs.working,
    }


def _print(row: dict[str, object], *, first: bool) -> None:
    if first:
        print(
            f"{'shape':34} {'peer':13} {'ours s':>8} {'peer s':>8} {'ratio':>8} {'target':>7}"
            f" {'ours MiB':>9} {'peer MiB':>9} {'memory':>7} {'working':>12} {'forward':>8} {'step':>7}"
        )
    target = "" if row["target_ratio"] is None else f"{row['target_ratio']}x"
    print(
        f"{row['shape']:34} {row['peer']:13} {row['ours_seconds']:8.4f} {row['peer_seconds']:8.3f}"
        f" {row['ratio']:7.1f}x {target:>7} {row['ours_extra_mib']:9.0f} {row['peer_extra_mib']:9.0f}"
        f" {row['memory_ratio']:7.3f} {row['ours_working_mib']:5.0f}/{row['peer_working_mib']:<6.0f}"
        f" {row['forward_share_of_matmul']:8.1%} {row['step_share_of_matmul']:7.1%}",
        flush=True,
    )


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.matching", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast is it")
    parser.add_argument("--shape", type=int, choices=range(1, 1 + len(SHAPES)), help="only this one")
    parser.add_argument("--peer", choices=TARGETS, help="only beside this one")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory:
        asked = json.loads(given.memory)
        print(json.dumps(asdict(first_step(Shape(**asked["shape"]), asked["name"]))))
        return
    run(given.quick, given.shape, given.peer)


if __name__ == "__main__":
    main()
