"""The training: `nearkin-train` with the demo's recipe. docs/LOG.md tells how it was found."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

EPOCHS = 40
RUN = "demo"
RECIPE = {
    "--batch.classes": 32,
    "--batch.images": 2,
    "--batch.kin": 4,
    "--batch.reach": 12,
    "--neighbour.k": 16,
    "--loss.softmax": 0.5,
    "--loss.batch-softmax": 1.0,
    "--cosine.weight": 1.0,
    # Vendors draw an emoji in the same place and size: it is moved about less than by default.
    "--augment.rotate": 5,
    "--augment.zoom": 0.1,
    "--augment.stretch": 0.1,
    "--augment.shift": 0.05,
    "--augment.shear": 0.05,
}


def train(out: Path, service: str, processes: int, minutes: float) -> None:
    """Trains until the epochs are done or the minutes are over.

    Raises:
        SystemExit: the training failed; it has said why.
    """
    command = [Path(sys.executable).with_name("nearkin-train")]
    options = {
        "--data": out / "data" / "data.csv",
        "--out": out,
        "--service": service,
        "--run-name": RUN,
        "--processes": processes,
        "--epochs": EPOCHS,
        "--minutes": minutes,
        "--evaluate.every": 8,
        **RECIPE,
    }
    flags = ["--overwrite", "--evaluate.baselines"]
    words = [str(word) for option in options.items() for word in option]
    done = subprocess.run([*map(str, command), *words, *flags], check=False)  # noqa: S603 - our own command
    if done.returncode:
        raise SystemExit(done.returncode)


def metrics(out: Path) -> dict[str, Any]:
    """What the training wrote down."""
    return dict(json.loads((out / "metrics.json").read_text()))
