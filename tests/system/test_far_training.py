"""A training whose service is at the other end of a bad line ends with the same weights, bit for bit."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.service.faulting import FAR_PORT, far_service
from tests.service.test_network import change

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--image.height", "16", "--image.width", "16", "--model.width", "4", "--model.channels", "8"),
    *("--batch.classes", "4", "--batch.images", "2", "--batch.steps", "3", "--neighbour.k", "5"),
    *("--model.matching", "plain", "--no-tensorboard", "--device", "cpu", "--epochs", "12"),
]


def training(data: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "nearkin_trainer", "--data", str(data), "--out", str(out), *SMALL, *more]
    environment = {key: value for key, value in os.environ.items() if key != "NEARKIN_SERVICE"}
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_training_over_a_bad_line(tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("nearkin_trainer.checkpoint")
    torch = pytest.importorskip("torch")
    from tests.trainer.pictures import write_csv_set

    data = write_csv_set(tmp_path / "pictures")
    assert training(data, tmp_path / "near").wait(600) == 0
    (tmp_path / "service").mkdir()
    chance, happened = random.Random(6), []
    with far_service(tmp_path / "service", 0.05, 60, 40) as (process, line):
        far = training(data, tmp_path / "far", "--service", f"{line.host}:{FAR_PORT}")
        while far.poll() is None:
            happened.append(change(line, chance))
            if chance.random() < 0.2:
                process.kill()
                assert process.start(), process.log.read_text()
                happened.append("death")
            time.sleep(0.1)
    assert far.returncode == 0, (tmp_path / "far.log").read_text()[-2000:]
    near, away = (checkpoint.load(tmp_path / name / "checkpoint.npz")["model"] for name in ("near", "far"))
    print(happened)
    for name in near:
        assert torch.equal(near[name], away[name]), name
