"""From a path on disk to a data set: recognises the layout and checks what it finds."""

import dataclasses
import hashlib
import logging
import stat
from collections import Counter
from pathlib import Path

from nearkin_trainer.data.csv_file import read_csv
from nearkin_trainer.data.folders import read_folders
from nearkin_trainer.data.market import is_market, read_market
from nearkin_trainer.data.values import DataSet

logger = logging.getLogger("nearkin.trainer.data")

_SHOWN = 3


def read_data(path: Path, *, validation_share: float = 0.2) -> DataSet:
    """Reads a CSV file, a folder in the Market-1501 layout, or a folder with one folder per class.

    Args:
        path: the CSV file or the folder.
        validation_share: share of the classes set aside when class folders come without a split, 0 to below
            1.

    Raises:
        ValueError: nothing readable is there, or something in it is wrong; the message says where.
    """
    if not 0 <= validation_share < 1:
        raise ValueError(f"validation_share={validation_share} must be at least 0 and below 1")
    try:
        data = _read(path, validation_share)
    except OSError as error:
        raise ValueError(f"data={path} cannot be read: {error}") from error
    sizes = _require_files(data)
    _judge_repeated(data)
    logger.info("%s: %s", path, data.summary())
    return dataclasses.replace(data, digest=_digest(data, path if path.is_dir() else path.parent, sizes))


def _read(path: Path, validation_share: float) -> DataSet:
    if path.is_file():
        return read_csv(path)
    if not path.is_dir():
        raise ValueError(f"data={path}: no such file or folder")
    if is_market(path):
        return read_market(path)
    tables = sorted(path.glob("*.csv"))
    if len(tables) == 1:
        return read_csv(tables[0])
    if tables and sum(child.is_dir() for child in path.iterdir()) < 2:  # not a folder per class
        raise ValueError(f"data={path} holds {len(tables)} CSV files ({_some(tables)}): name one of them")
    return read_folders(path, validation_share)


def _require_files(data: DataSet) -> dict[Path, int]:
    """The size of each."""
    paths = {*data.train.paths, *data.query.paths, *data.gallery.paths}
    sizes = {path: size for path in paths if (size := _size(path)) is not None}
    if missing := sorted(paths - sizes.keys()):
        raise ValueError(f"{len(missing)} of {len(paths)} images do not exist: {_some(missing)}")
    return sizes


def _judge_repeated(data: DataSet) -> None:
    """Says what is named more than once; an image of two classes would be pulled both ways."""
    label: dict[Path, int] = {}
    for path, number in zip(data.train.paths, data.train.labels.tolist(), strict=True):
        if label.setdefault(path, number) != number:
            names = f"{data.classes[label[path]]!r} and {data.classes[number]!r}"
            raise ValueError(f"{path} is a training image of two classes, {names}: name it once")
    for what, images in (("training", data.train), ("query", data.query), ("gallery", data.gallery)):
        twice = sorted(path for path, count in Counter(images.paths).items() if count > 1)
        if twice:
            logger.warning(
                "%d %s images are named more than once, and count as often: %s",
                len(twice),
                what,
                _some(twice),
            )
    seen = sorted(label.keys() & {*data.query.paths, *data.gallery.paths})
    if seen:
        logger.warning("%d validation images are trained on, too: %s", len(seen), _some(seen))


def _digest(data: DataSet, folder: Path, sizes: dict[Path, int]) -> str:
    """Of names within the folder, so that it may move."""
    digest, start = hashlib.sha256(), f"{folder}/"
    for path, label in zip(data.train.paths, data.train.labels.tolist(), strict=True):
        digest.update(
            f"{str(path).removeprefix(start)}\0{sizes[path]}\0{label}\n".encode(errors="surrogateescape")
        )
    return digest.hexdigest()[:16]


def _some(paths: list[Path]) -> str:
    return ", ".join(map(str, paths[:_SHOWN])) + (", ..." if len(paths) > _SHOWN else "")


def _size(path: Path) -> int | None:
    """None: no file."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # a name that is too long, a folder that may not be entered
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None
