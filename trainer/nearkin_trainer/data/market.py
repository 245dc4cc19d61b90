"""Data in the layout of Market-1501: `0002_c1s1_000451_03.jpg` is person 0002 seen by camera 1.

In the gallery, person -1 is junk (neither right nor wrong) and person 0000 a distractor (always wrong). Junk
among the training images is left out.
"""

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nearkin_trainer.data.folders import image_files
from nearkin_trainer.data.values import JUNK, DataSet, ImageList, number_names

_TRAIN, _QUERY, _GALLERY = "bounding_box_train", "query", "bounding_box_test"
_NAME = re.compile(r"(-1|\d+)_c(\d+)")
_JUNK_NAME = "-1"

Images = tuple[tuple[Path, ...], list[str], NDArray[np.int64]]


def is_market(path: Path) -> bool:
    """Whether the three folders are there."""
    return all((path / name).is_dir() for name in (_TRAIN, _QUERY, _GALLERY))


def read_market(path: Path) -> DataSet:
    """Reads such a folder.

    Raises:
        ValueError: a file is not named like that.
    """
    train_files, train_people, train_cameras = _read(path / _TRAIN, leave=_JUNK_NAME)
    query_files, query_people, query_cameras = _read(path / _QUERY)
    gallery_files, gallery_people, gallery_cameras = _read(path / _GALLERY)
    train_labels, classes = number_names(train_people)
    people = [*query_people, *gallery_people]
    labels, names = number_names(people)
    labels[np.array(people) == _JUNK_NAME] = JUNK
    count = len(query_files)
    return DataSet(
        ImageList(train_files, train_labels, train_cameras),
        classes,
        ImageList(query_files, labels[:count], query_cameras),
        ImageList(gallery_files, labels[count:], gallery_cameras),
        names,
    )


def _read(folder: Path, leave: str | None = None) -> Images:
    """Files, people and cameras; without those of the person `leave`."""
    files, people, cameras = [], [], []
    for file in image_files(folder.iterdir()):
        match = _NAME.match(file.name)
        if match is None:
            raise ValueError(f"{file}: expected a name like 0002_c1s1_000451_03.jpg (person, camera)")
        if match[1] != leave:
            files.append(file)
            people.append(match[1])
            cameras.append(int(match[2]))
    return tuple(files), people, np.array(cameras, dtype=np.int64)
