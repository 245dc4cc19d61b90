"""What the demo prints. Every number comes from the run itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from examples.demo.prepare import PROBE, SIZE


def step(console: Console, number: int, title: str) -> None:
    """A heading."""
    console.print()
    console.rule(f"[bold]{number}  {title}", align="left")


def data(console: Console, counts: Mapping[str, int], folder: Path) -> None:
    """How many images there are, and of what."""
    console.print(
        f"{counts['drawings']:,} drawings without skin tones; {counts['repeated']:,} left out because their "
        "pixels occur more than once\n"
        f"to learn:   {counts['train_images']:,} images of {counts['train_classes']:,} emoji by six vendors\n"
        f"to be recognised unseen:  {counts['queries']:,} drawings by {PROBE} among "
        f"{counts['gallery_images']:,} by the six others, of {counts['unseen_classes']:,} other emoji\n"
        f"{SIZE}x{SIZE} pixels, in {folder}"
    )


def results(console: Console, metrics: Mapping[str, Any]) -> None:
    """Rank-1 and mAP of the unseen classes, beside what there was before training."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("", "rank-1", "rank-5", "mAP"):
        table.add_column(title, justify="left" if not title else "right")
    for name, prefix in (
        ("raw pixels, nearest neighbour", "baseline_pixels_"),
        ("the network before training", "baseline_untrained_"),
        ("the network after training", ""),
    ):
        values = (metrics.get(f"{prefix}{key}") for key in ("rank1", "rank5", "mAP"))
        table.add_row(name, *(f"{value:.3f}" if value is not None else "" for value in values))
    console.print(table)
    gain = 100 * (metrics["rank1"] - metrics["baseline_pixels_rank1"])
    console.print(
        f"\n{gain:+.1f} points of rank-1 over raw pixels; {metrics['epochs']} epochs in "
        f"{minutes(metrics['train_seconds'])}, {metrics['images_per_second']:.0f} images/s; a worker waited "
        f"{metrics['refresh_stall_seconds']:.1f} s in all for its neighbour tables"
    )


def places(console: Console, out: Path) -> None:
    """The files that are left."""
    for path, what in (
        ("metrics.json", "every number above, and each epoch's losses"),
        ("checkpoint.npz", "the trained network and class embeddings"),
        ("config.json", "the training's whole configuration"),
        ("data", "the images and data.csv"),
        ("names.csv", "class id and name"),
        ("service", "every generation: nearkin-serve --data-dir serves them again"),
        ("tensorboard", "curves"),
    ):
        console.print(f"{out / path}", f"[dim]{what}", sep="   ")


def minutes(seconds: float) -> str:
    """As minutes and seconds."""
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
