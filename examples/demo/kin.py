"""Nearest kin by name, through the `nearkin` command that people would type."""

import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from examples.demo.training import RUN

EXAMPLES = ("dog face", "slice of pizza", "thunder cloud and rain", "violin", "grinning face", "bicycle")
SHOWN = 3
NAMES = "names.csv"


def ask(console: Console, out: Path, service: str) -> None:
    """Shows three training classes with their five nearest classes in the newest generation."""
    classes = write_names(out)
    known = [name for name in EXAMPLES if name in classes] or classes
    words = ["nearest", *known[:SHOWN], "--run", RUN, "--k", "5", "--names", str(out / NAMES)]
    console.print(f"$ nearkin {shlex.join(words)} --service …\n", style="dim", soft_wrap=True)
    command = [str(Path(sys.executable).with_name("nearkin")), *words, "--service", service]
    subprocess.run(command, check=True)  # noqa: S603 - our own command


def write_names(out: Path) -> list[str]:
    """`names.csv` (class id, name), from the class names that the training wrote; returns them by id."""
    classes: list[str] = json.loads((out / "classes.json").read_text())
    with (out / NAMES).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("class", "name"), *enumerate(classes)])
    return classes
