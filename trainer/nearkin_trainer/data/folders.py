"""Data as one folder per class; optionally below `train/` and `validation/` (or `val/`, `test/`)."""

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from nearkin_trainer.data.queries import choose_queries
from nearkin_trainer.data.values import NO_CAMERA, DataSet, ImageList, number_names

logger = logging.getLogger("nearkin.trainer.data")

_VALIDATION_NAMES = ("validation", "val", "test")


def read_folders(path: Path, validation_share: float) -> DataSet:
    """Reads such a folder; without a split, a share of the classes is set aside, the same at every call.

    Raises:
        ValueError: there are no images, or too few classes.
    """
    validation_name = next((name for name in _VALIDATION_NAMES if (path / name).is_dir()), None)
    if (path / "train").is_dir() and validation_name is not None:
        train, validation = _files_by_class(path / "train"), _files_by_class(path / validation_name)
    else:
        train, validation = _set_aside(_files_by_class(path), validation_share)
    train_images, classes = _images(train)
    images, names = _images(validation)
    return DataSet(train_images, classes, *choose_queries(images), names)


def image_files(files: Iterable[Path]) -> list[Path]:
    """Those that Pillow can open by their names, sorted; hidden ones, which systems leave behind, are not."""
    Image.init()
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(
        f for f in files if f.suffix.lower() in suffixes and not f.name.startswith(".") and f.is_file()
    )


def _files_by_class(path: Path) -> dict[str, list[Path]]:
    found = {}
    for folder in sorted(path.iterdir()):
        if folder.is_dir() and not folder.name.startswith("."):
            files = image_files(folder.rglob("*"))
            if files:
                found[folder.name] = files
    if not found:
        raise ValueError(
            f"{path}: no image in any folder below it; expected a CSV file, one folder per class, or the "
            "Market-1501 layout (bounding_box_train, query, bounding_box_test)"
        )
    return found


def _set_aside(
    files: dict[str, list[Path]], share: float
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Splits by class, so that validation classes are unseen."""
    names = sorted(files)
    count = round(share * len(names))
    aside = {names[i] for i in np.random.default_rng(0).permutation(len(names))[:count]}
    if count and len(names) - count < 2:
        raise ValueError(
            f"image.validation-share={share} sets {count} aside of the {len(names)} classes; "
            "at least 2 must be left to train"
        )
    logger.info(
        "class folders without a split: %d of %d classes are set aside for validation", count, len(names)
    )
    return {n: files[n] for n in names if n not in aside}, {n: files[n] for n in names if n in aside}


def _images(files: dict[str, list[Path]]) -> tuple[ImageList, tuple[str, ...]]:
    labels, names = number_names([name for name, paths in files.items() for _ in paths])
    paths = tuple(path for members in files.values() for path in members)
    return ImageList(paths, labels, np.full(len(paths), NO_CAMERA)), names
