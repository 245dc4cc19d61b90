"""Waiting for tables, blocking and in the background: `python -m tests.bench.turnaround [--quick]`.

`nearkin-train` with two processes and a service, on classes whose table takes about as long as an epoch's
steps. *shared cores* leaves all of them to each other, so that a table made meanwhile slows the steps down;
*a core apart* gives the service the last core and the ranks the others, as if it ran on another machine.
Figures are of the epochs after the first, which waits for its table in both ways: seconds per epoch, and of
these how long each rank stood still. *job* is the whole command, first and last table included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearkin_client.local import LocalService

from tests.trainer.pictures import draw, write_csv

PICTURES = 64  # drawn; classes share them, as nobody looks at what was learned
PROCESSES = 2
WAYS = ("blocking", "background")
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much there is to do; maps are 128 x 4 x 4."""

    classes: int = 16_384
    steps: int = 16
    epochs: int = 5


def write_data(folder: Path, classes: int) -> Path:
    """Training images only."""
    for picture in range(PICTURES):
        draw(picture, 0, (64, 64)).save(folder / f"{picture}.png")
    rows = (
        {"label": str(label), "path": f"{label % PICTURES}.png", "split": "train"} for label in range(classes)
    )
    return write_csv(folder / "data.csv", rows)


def train(data: Path, folder: Path, service: str, size: Size, refresh: str) -> Row:
    """Runs the command; what it cost."""
    out = folder / refresh
    options = {
        "--data": data,
        "--out": out,
        "--service": service,
        "--processes": PROCESSES,
        "--epochs": size.epochs,
        "--batch.steps": size.steps,
        "--embedding.start": "noise",
        "--refresh": refresh,
        "--device": "cpu",
    }
    words = [str(word) for option in options.items() for word in option]
    command = [sys.executable, "-m", "nearkin_trainer", *words, "--no-tensorboard"]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    took = time.perf_counter() - began
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((out / "metrics.json").read_text())
    lag = [max(0, entry["epoch"] - metrics["staleness"]) for entry in metrics["history"]]
    assert [entry["table_epoch"] for entry in metrics["history"]] == lag, metrics["history"]
    return summary(metrics) | {"job_seconds": round(took, 1)}


def summary(metrics: Row) -> Row:
    """Of the epochs after the first."""
    later = metrics["history"][1:]
    stalls = [entry["refresh_stall_seconds_per_rank"] for entry in later]
    return {
        "epoch_seconds": round(statistics.mean(entry["seconds"] for entry in later), 2),
        "waited_seconds_per_rank": [round(statistics.mean(each), 2) for each in zip(*stalls, strict=True)],
    }


@contextmanager
def running_on(cores: set[int]) -> Iterator[None]:
    """Processes started meanwhile run on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(where: str, served: set[int], trained: set[int], size: Size) -> list[Row]:
    """Both ways, each with a new service, on given cores."""
    rows: list[Row] = []
    for refresh in WAYS:
        with tempfile.TemporaryDirectory(prefix="nearkin-bench-") as name:
            folder = Path(name)
            data = write_data(folder, size.classes)
            with running_on(served):
                service = LocalService(folder / "service").start()
            try:
                with running_on(trained):
                    row = train(data, folder, service.address, size, refresh)
            finally:
                service.stop()
        rows.append({"name": f"turnaround, {where}", "refresh": refresh, **row})
    for row in rows:
        row["of_blocking"] = round(row["epoch_seconds"] / rows[0]["epoch_seconds"], 3)
        row["waited_share"] = round(max(row["waited_seconds_per_rank"]) / row["epoch_seconds"], 3)
    return rows


def run(quick: bool, only: str | None = None) -> list[Row]:
    """Measure, print a table, and return its rows."""
    size = Size(classes=512, steps=2, epochs=3) if quick else Size()
    cores = os.sched_getaffinity(0)
    last = {max(cores)}
    places = {"shared cores": (cores, cores), "a core apart": (last, cores - last)}
    if len(cores) == 1:
        del places["a core apart"]
    rows: list[Row] = []
    print(
        f"{'cores':14} {'refresh':12} {'epoch s':>8} {'waited s':>14} {'share':>6} {'job s':>7} {'ratio':>6}"
    )
    for where, (served, trained) in places.items():
        if only not in {None, where}:
            continue
        for row in measure(where, served, trained, size):
            waited = ", ".join(f"{seconds:.2f}" for seconds in row["waited_seconds_per_rank"])
            print(
                f"{where:14} {row['refresh']:12} {row['epoch_seconds']:8.2f} {waited:>14} "
                f"{row['waited_share']:6.2f} {row['job_seconds']:7.1f} {row['of_blocking']:6.3f}",
                flush=True,
            )
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.turnaround", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few classes: does it run, not what it costs")
    parser.add_argument("--only", choices=["shared cores", "a core apart"], help="one of the two")
    given = parser.parse_args()
    run(given.quick, given.only)


if __name__ == "__main__":
    main()
