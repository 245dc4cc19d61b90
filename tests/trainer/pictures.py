"""Small data sets that tests draw themselves: classes are arrangements of coloured shapes."""

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def draw(class_id: int, variant: int, size: tuple[int, int] = (28, 24)) -> Image.Image:
    """One image of a class; variants differ in background and in small shifts."""
    width, height = size
    fixed, free = np.random.default_rng([class_id, 0]), np.random.default_rng([class_id, 1, variant])
    image = Image.new("RGB", size, tuple(free.integers(180, 255, 3).tolist()))
    pen = ImageDraw.Draw(image)
    for _ in range(2):
        x, y = (fixed.uniform(0.1, 0.6, 2) + free.normal(0, 0.03, 2)) * (width, height)
        colour = tuple(fixed.integers(0, 200, 3).tolist())
        box = (x, y, x + width * 0.35, y + height * 0.35)
        (pen.ellipse if fixed.integers(2) else pen.rectangle)(box, fill=colour)
    return image


def write_csv_set(
    folder: Path,
    *,
    train_classes: int = 12,
    validation_classes: int = 4,
    images: int = 4,
    cameras: bool = False,
) -> Path:
    """A data set as a CSV file; returns the file's path. Variant 0 of each validation class asks."""
    rows = []
    for class_id in range(train_classes + validation_classes):
        for variant in range(images):
            path = folder / "images" / f"{class_id}_{variant}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(class_id, variant).save(path)
            is_train = class_id < train_classes
            row = {
                "label": f"class {class_id}",
                "path": f"images/{path.name}",
                "split": "train" if is_train else "validation",
                "is_query": "" if is_train else str(variant == 0),
                "is_gallery": "" if is_train else str(variant > 0),
            }
            rows.append({**row, "camera": str(variant)} if cameras else row)
    return write_csv(folder / "data.csv", rows)


def write_csv(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    """Writes dicts of the same keys."""
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path
