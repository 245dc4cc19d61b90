"""`make bench`: every benchmark beside its peers, in one run on one machine.

Each module named in `BENCHMARKS` has `run(quick) -> list[dict]`, prints its own table, and runs by itself too
(`python -m tests.bench.tables`). All rows land in bench/results/latest.json with the machine and the date.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

BENCHMARKS = ("tables", "matching", "steps", "sharding", "transport", "turnaround")
RESULTS = Path(__file__).parents[2] / "bench" / "results" / "latest.json"
PACKAGES = (
    "nearkin-service",
    "nearkin-client",
    "nearkin-trainer",
    "faiss-cpu",
    "grpcio",
    "numpy",
    "pyarrow",
    "torch",
)


def machine() -> dict[str, object]:
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.partition(":")[2].strip() for line in cpu.splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(names),
        "kernel": platform.release(),
    }


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(BENCHMARKS)}; all when none is named")
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not how fast is it")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; choose from {', '.join(BENCHMARKS)}")
    names = arguments.names or BENCHMARKS
    modules = {
        name: importlib.import_module(f"tests.bench.{name}") for name in names
    }  # all, before the first runs
    results = {name: module.run(quick=arguments.quick) for name, module in modules.items()}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "quick": arguments.quick,
        "machine": machine(),
        "versions": versions(),
        "results": results,
    }
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(
        f"\nwritten to {RESULTS.relative_to(Path.cwd()) if RESULTS.is_relative_to(Path.cwd()) else RESULTS}"
    )


if __name__ == "__main__":
    main()
