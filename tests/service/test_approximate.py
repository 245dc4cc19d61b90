"""Engine `ivf` over the wire: its recall is measured, tuned to what the service was told, and reported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import grpc
import numpy as np
import pytest
from nearkin.v1 import neighbours_pb2 as pb

from tests.service.conftest import Caller, Serving, brute_force, random_rows, refusal

CENTRES = random_rows(60, 16, seed=1)
ROWS = CENTRES[np.random.default_rng(2).integers(0, 60, 3000)] + 0.7 * random_rows(3000, 16, seed=3)


def true_recall(ids: np.ndarray) -> float:
    truth = brute_force(ROWS, 5)
    return float(np.mean([len(np.intersect1d(a, b)) / 5 for a, b in zip(ids, truth, strict=True)]))


def check(caller: Caller, number: int, target: float) -> pb.Generation:
    found = caller.generation(number)
    assert (found.engine, found.exact) == ("ivf", False)
    recall, real = found.recall, true_recall(caller.table(generation=number).ids)
    assert 0 < recall.low <= recall.value <= recall.high <= 1
    assert recall.sampled_rows == 1000
    assert recall.low - 0.01 <= real <= recall.high + 0.01
    assert real >= target - 0.01
    return found


def test_a_push_may_ask_for_it(caller: Caller) -> None:
    caller.push(ROWS, engine="ivf")
    check(caller, 1, 0.99)


def test_the_service_can_be_told_to_and_how_well(serve: Callable[..., Serving]) -> None:
    serving = serve("--engine", "ivf", "--target-recall", "0.5")
    caller = serving.caller()
    caller.push(ROWS, 0)
    caller.push(ROWS, 1, engine="flat")
    assert check(caller, 1, 0.5).recall.value < 1
    exact = caller.generation(2)
    assert (exact.exact, exact.HasField("recall")) == (True, False)
    command = [sys.executable, "-c", "from nearkin_client.cli import main; main()", "generations"]
    shown = subprocess.run(
        [*command, "--run", "run", "--service", serving.address],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "recall 0." in shown.stdout


@pytest.mark.parametrize("target", ["0", "1.5", "-1"])
def test_impossible_targets_are_refused(target: str, tmp_path: object) -> None:
    command = [sys.executable, "-m", "nearkin_service", "--data-dir", f"{tmp_path}/data"]
    done = subprocess.run(
        [*command, "--target-recall", target], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert "target_recall" in done.stderr


def test_an_engine_that_there_is_not_is_refused(caller: Caller) -> None:
    assert refusal(lambda: caller.begin(ROWS, engine="hnsw")).code() is grpc.StatusCode.INVALID_ARGUMENT
