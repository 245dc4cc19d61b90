"""Data in the layout of Market-1501: `0002_c1s1_000451_03.jpg` is person 0002 seen by camera 1.

In the gallery, person -1 is junk (neither right nor wrong) and person 0000 a distractor (always wrong).
"""

import re
from pathlib import Path

import numpy as np

from nearkin_trainer.data.folders import image_suffixes
from nearkin_trainer.data.values import JUNK, DataSet, ImageList, number_names

_TRAIN, _QUERY, _GALLERY = "bounding_box_train", "query", "bounding_box_test"
_NAME = re.compile(r"(-1|\d+)_c(\d+)")


def is_market(path: Path) -> bool:
    """Whether the three folders are there."""
    return all((path / name).is_dir() for name in (_TRAIN, _QUERY, _GALLERY))


def read_market(path: Path) -> DataSet:
    """Reads such a folder.

    Raises:
        ValueError: a file is not named like that.
    """
    train_files, train_people, train_cameras = _read(path / _TRAIN)
    query_files, query_people, query_cameras = _read(path / _QUERY)
    gallery_files, gallery_people, gallery_cameras = _read(path / _GALLERY)
    train_labels, classes = number_names(train_people)
    people = [*query_people, *gallery_people]
    labels, names = number_names(people)
    labels[np.array(people) == "-1"] = JUNK
    count = len(query_files)
    return DataSet(
        ImageList(train_files, train_labels, train_cameras),
        classes,
        ImageList(query_files, labels[:count], query_cameras),
        ImageList(gallery_files, labels[count:], gallery_cameras),
        names,
    )


def _read(folder: Path) -> tuple[tuple[Path, ...], list[str], "np.ndarray[tuple[int], np.dtype[np.int64]]"]:
    suffixes = image_suffixes()
    files = tuple(sorted(f for f in folder.iterdir() if f.suffix.lower() in suffixes))
    matches = [(_NAME.match(f.name), f) for f in files]
    people, cameras = [], []
    for match, file in matches:
        if match is None:
            raise ValueError(f"{file}: expected a name like 0002_c1s1_000451_03.jpg (person, camera)")
        people.append(match[1])
        cameras.append(int(match[2]))
    return files, people, np.array(cameras, dtype=np.int64)
