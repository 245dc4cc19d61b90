"""Exact tables beside their peers: `python -m tests.bench.tables [--quick | --grid]`.

All sides are given the same normalised float32 keys in memory and the same cores, and are warmed up alike.
FAISS and ours take turns, and the ratio is of medians. "Ours" is a whole build: keys, products, certificate,
order. The peak is what a plain square matrix product reaches here in the same minute; ours, which computes
half of the products, is held against the bfloat16 peak, FAISS and the N x N matrix against float32. Where
FAISS does not choose AVX-512 kernels by itself, it is measured with them too, in a process of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nearkin_service.engines import BuildRequest, auto, build_table, loading, ways, worker_count
from nearkin_service.engines.pacing import Silence
from numpy.typing import NDArray

from tests.bench import tables_peers as peers
from tests.bench.faiss_peer import Peer, with_wide_kernels


@dataclass(frozen=True)
class Problem:
    """N classes of D elements, k neighbours; `groups` clusters, or none."""

    N: int
    D: int
    k: int
    groups: int = 0
    rounds: int = 3
    approximate: bool = False
    matrix: bool = True

    def __str__(self) -> str:
        kind = f"{self.groups} clusters" if self.groups else "unclustered"
        return f"{self.N:,} x {self.D:,}, k={self.k}, {kind}"

    def keys(self) -> NDArray[np.float32]:
        random = np.random.default_rng(2026)
        rows = random.standard_normal((self.N, self.D), dtype=np.float32)
        if self.groups:
            centres = random.standard_normal((self.groups, self.D), dtype=np.float32)
            rows = centres[random.integers(0, self.groups, self.N)] + 0.5 * rows
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows


PROBLEMS = (
    Problem(20_000, 512, 32, approximate=True),
    Problem(20_000, 512, 32, groups=200),
    Problem(5_000, 25_088, 32),
    Problem(5_000, 25_088, 32, groups=50),
    Problem(100_000, 512, 64, rounds=1, matrix=False),
    Problem(100_000, 512, 64, groups=1000, rounds=1, matrix=False),
)
GRID = tuple(
    Problem(N, D, k, groups=max(2, N // 100), matrix=False)
    for N in (100, 1_000, 5_000, 20_000, 100_000)
    for D in (32, 128, 512, 2048)
    for k in (10, 64, 256)
    if k < N
)
"""Where the rule of `auto` has to hold: nowhere more than 10 % slower than FAISS flat."""
QUICK = (Problem(3_000, 128, 16, approximate=True), Problem(3_000, 128, 16, groups=60))


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def rested(timed: Callable[[], float]) -> float:
    """What it returns, once no thread of the one before is still waiting busily for more work."""
    time.sleep(0.02)
    return timed()


def peak(dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations per second of a square matrix product, best of five."""
    matrix = torch.randn(size, size).to(dtype)
    torch.mm(matrix, matrix)
    return 2.0 * size**3 / min(seconds(lambda: torch.mm(matrix, matrix)) for _ in range(5))


def ours(keys: NDArray[np.float32], k: int, engine: str = "auto") -> Any:
    request = BuildRequest((keys.shape[1],), "flat", k, engine, "cpu", np.empty(0, np.int64))
    return build_table(keys, request, Silence())


def warm_up(problem: Problem) -> None:
    """Compiled loops are there, threads are awake."""
    job = ways.Job(problem.N, problem.D, problem.k)
    if auto.choose("auto", job, "cpu")[0] == "mixed":
        loading.wait(job)
    ours(problem.keys()[: max(2100, 5 * problem.k)], problem.k)


def measure(problem: Problem, wide: Peer | None = None) -> list[dict[str, Any]]:
    keys = problem.keys()
    warm_up(problem)
    peers.faiss_flat(keys[:1000], problem.k)
    torch.set_num_threads(worker_count())
    peaks = {"float32": peak(torch.float32), "bfloat16": peak(torch.bfloat16)}
    times: dict[str, list[float]] = {"FAISS flat": [], "nearkin auto": []}
    if wide:
        times["FAISS flat, AVX-512"] = []
        wide.load(keys)
    for _ in range(problem.rounds):
        times["FAISS flat"].append(seconds(lambda: peers.faiss_flat(keys, problem.k)))
        times["nearkin auto"].append(seconds(lambda: ours(keys, problem.k)))
        if wide:
            times["FAISS flat, AVX-512"].append(wide.search(problem.k))
    if problem.matrix:
        times["N x N matrix + topk"] = [seconds(lambda: peers.matrix_topk(keys, problem.k))]
    table = ours(keys, problem.k)
    rows = [_row(problem, name, taken, times["FAISS flat"], peaks) for name, taken in times.items()]
    rows[1] |= {
        "engine": table.engine,
        "recomputed_rows": table.recomputed_rows,
        "stages": dict(table.stage_seconds),
    }
    if problem.approximate:
        for name, search in peers.APPROXIMATE.items():
            taken, ids = search(keys, problem.k)
            row = _row(problem, name, [taken], times["FAISS flat"], peaks)
            rows.append(row | {"recall": recall(ids, table.ids), "share_of_peak": None})
    return rows


def grid(most_classes: int, least_classes: int = 0) -> list[dict[str, Any]]:
    """The rule of `auto` on the grid: medians of a few runs, or of one where FAISS takes long."""
    rows = []
    print(f"{'N':>8}{'D':>6}{'k':>5}  {'engine':8}{'FAISS':>9}{'AVX-512':>9}{'auto':>9}{'ratios':>14}")
    with with_wide_kernels() as wide:
        if wide is None:
            print("no other kernels were tried: the AVX-512 column repeats FAISS's own choice")
        for problem in GRID:
            if not least_classes <= problem.N <= most_classes:
                continue
            engine, faiss, best, auto = _taking_turns(problem, wide)
            print(
                f"{problem.N:8,}{problem.D:6,}{problem.k:5}  {engine:8}{faiss:9.4f}{best:9.4f}{auto:9.4f}"
                f"{faiss / auto:7.2f}{best / auto:7.2f}{'' if auto <= 1.1 * best else '  slower'}",
                flush=True,
            )
            row = {"problem": str(problem), "engine": engine}
            rows.append(row | {"faiss": faiss, "faiss_avx512": best, "auto": auto})
    return rows


def _taking_turns(problem: Problem, wide: Peer | None) -> tuple[str, float, float, float]:
    """The engine that auto chose, and median seconds: of FAISS, of FAISS with its best kernels, of auto."""
    keys = problem.keys()
    warm_up(problem)
    engine = ours(keys, problem.k).engine
    if wide:
        wide.load(keys)
        wide.search(problem.k)
    first = seconds(lambda: peers.faiss_flat(keys, problem.k))
    times: list[tuple[float, float, float]] = []
    for _ in range(31 if first < 0.1 else 3 if first < 4 else 1):
        faiss = rested(lambda: seconds(lambda: peers.faiss_flat(keys, problem.k)))
        best = rested(lambda: wide.search(problem.k)) if wide else faiss
        times.append((faiss, best, rested(lambda: seconds(lambda: ours(keys, problem.k)))))
    faiss, best, auto = (statistics.median(side) for side in zip(*times, strict=True))
    return engine, faiss, best, auto


def _row(
    problem: Problem, name: str, taken: list[float], faiss: list[float], peaks: dict[str, float]
) -> dict[str, Any]:
    middle = statistics.median(taken)
    half = name == "nearkin auto"
    products = problem.N * problem.N * problem.D * (1.0 if half else 2.0)
    return {
        "problem": str(problem),
        "what": name,
        "seconds": round(middle, 4),
        "times_faiss": round(statistics.median(faiss) / middle, 2),
        "share_of_peak": round(products / middle / max(peaks.values()) if half else peaks["float32"], 3),
        "peak_gflops": {dtype: round(value / 1e9) for dtype, value in peaks.items()},
        "recall": 1.0,
    }


def recall(found: NDArray[Any], truth: NDArray[Any]) -> float:
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True))
    return round(hits / truth.size, 4)


def run(quick: bool) -> list[dict[str, Any]]:
    """Measure, print a table, and return its rows."""
    with with_wide_kernels() as wide:
        return _run(QUICK if quick else PROBLEMS, wide)


def _run(problems: Sequence[Problem], wide: Peer | None) -> list[dict[str, Any]]:
    rows = []
    for problem in problems:
        measured = measure(problem, wide)
        print(f"\n{problem}   (peaks, GFLOP/s: {measured[0]['peak_gflops']})")
        print(f"  {'':24}{'seconds':>10}{'x FAISS':>9}{'of peak':>9}{'recall':>8}")
        for row in measured:
            share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%}"
            print(
                f"  {row['what']:24}{row['seconds']:10.3f}{row['times_faiss']:9.2f}"
                f"{share:>9}{row['recall']:8.3f}"
            )
        rows += measured
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.tables", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast is it")
    parser.add_argument("--grid", action="store_true", help="the rule of auto beside FAISS flat, all sizes")
    parser.add_argument("--most-classes", type=int, default=100_000, help="with --grid: leave out larger N")
    parser.add_argument("--least-classes", type=int, default=0, help="with --grid: leave out smaller N")
    arguments = parser.parse_args()
    if arguments.grid:
        grid(arguments.most_classes, arguments.least_classes)
    else:
        run(quick=arguments.quick)
