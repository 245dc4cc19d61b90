"""From a path on disk to a data set: recognises the layout and checks what it finds."""

import logging
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
    _require_files(data)
    logger.info("%s: %s", path, data.summary())
    return data


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


def _require_files(data: DataSet) -> None:
    paths = {*data.train.paths, *data.query.paths, *data.gallery.paths}
    missing = sorted(path for path in paths if not _is_file(path))
    if missing:
        raise ValueError(f"{len(missing)} of {len(paths)} images do not exist: {_some(missing)}")


def _some(paths: list[Path]) -> str:
    return ", ".join(map(str, paths[:_SHOWN])) + (", ..." if len(paths) > _SHOWN else "")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False
