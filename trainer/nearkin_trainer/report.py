"""What a job tells people: progress on the terminal, TensorBoard files, and `metrics.json`. Rank 0 only."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nearkin_trainer.checkpoint import GO_ON, atomic_file


class Report:
    """A context manager; silent on all processes but the first.

    Args:
        folder: where TensorBoard files go.
        speaks: whether this process reports at all.
        tensorboard: whether TensorBoard files are written.
    """

    def __init__(self, folder: Path, *, speaks: bool, tensorboard: bool) -> None:
        self._console = Console(quiet=not speaks, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
            disable=not (speaks and self._console.is_terminal),
        )
        self._writer: Any = None
        if speaks and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def say(self, text: str) -> None:
        """One line for people."""
        self._console.print(text, markup=False, soft_wrap=True)

    def bar(self, description: str, total: int) -> "Bar":
        """A progress bar; a context manager."""
        return Bar(self._progress, description, total)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Points on TensorBoard curves."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)


class Bar:
    """One progress bar."""

    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total, note="")

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more are done; `note` stands behind the bar."""
        fields = {"note": note} if note else {}
        self._progress.update(self._task, advance=count, **fields)  # type: ignore[arg-type]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.remove_task(self._task)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all; numbers that JSON has not (NaN) become null.

    Raises:
        ValueError: the disk does not take it.
    """
    text = json.dumps(_finite(content), indent=2, allow_nan=False, ensure_ascii=False)
    try:
        with atomic_file(path) as file:
            file.write(text.encode() + b"\n")
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}. {GO_ON}") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
