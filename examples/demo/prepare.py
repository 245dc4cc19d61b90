"""Writes the demo's data set: small images and `data.csv`, as `nearkin-train --data` reads them."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from examples.demo.emoji import Drawing, Split, artwork, name, read_drawings, split, without_repeats

SIZE = 64
UNSEEN = 400
PROBE = "JoyPixels"
COLUMNS = ("label", "path", "split", "is_query", "is_gallery", "camera")
COUNTS = "counts.json"
CHOICES = {"probe": PROBE, "size": SIZE}


def prepare(folder: Path) -> dict[str, Any]:
    """Fills `folder`, unless that has been done; returns how many of everything there are."""
    done = folder / COUNTS
    if not _is_done(done):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        drawings = list(read_drawings(artwork(), SIZE))
        once = without_repeats(drawings)
        chosen = split(once, probe=PROBE, unseen=UNSEEN)
        write(folder, chosen)
        counts = {"drawings": len(drawings), "repeated": len(drawings) - len(once), **count(chosen)}
        unfinished = done.with_suffix(".tmp")
        unfinished.write_text(json.dumps({**counts, **CHOICES}, indent=2) + "\n")
        unfinished.replace(done)
    return dict(json.loads(done.read_text()))


def _is_done(done: Path) -> bool:
    """Whether it was done, and with today's choices."""
    return done.exists() and CHOICES.items() <= json.loads(done.read_text()).items()


def count(chosen: Split) -> dict[str, int]:
    """Images and classes of each part."""
    return {
        "train_classes": len({drawing.emoji for drawing in chosen.train}),
        "train_images": len(chosen.train),
        "unseen_classes": len(chosen.queries),
        "queries": len(chosen.queries),
        "gallery_images": len(chosen.gallery),
    }


def write(folder: Path, chosen: Split) -> None:
    """The images, one folder per vendor, and `data.csv`."""
    with (folder / "data.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.DictWriter(file, COLUMNS)
        rows.writeheader()
        for drawing, use in _uses(chosen):
            path = Path(drawing.vendor) / ("-".join(f"{ord(c):x}" for c in drawing.emoji) + ".png")
            (folder / path).parent.mkdir(exist_ok=True)
            Image.fromarray(drawing.pixels).save(folder / path, compress_level=1)
            rows.writerow({"label": name(drawing.emoji), "path": path, "camera": drawing.vendor, **use})


def _uses(chosen: Split) -> Iterator[tuple[Drawing, dict[str, str]]]:
    for drawings, use, query, gallery in (
        (chosen.train, "train", 0, 0),
        (chosen.queries, "validation", 1, 0),
        (chosen.gallery, "validation", 0, 1),
    ):
        for drawing in drawings:
            yield drawing, {"split": use, "is_query": str(query), "is_gallery": str(gallery)}
