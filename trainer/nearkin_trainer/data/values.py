"""What a data set is, whatever layout it was read from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NO_CAMERA = -1
JUNK = -1


@dataclass(frozen=True)
class ImageList:
    """Some images.

    Attributes:
        paths: one file each.
        labels: int64 `[n]`, positions in a tuple of class names; `JUNK` images count neither as right nor as
            wrong.
        cameras: int64 `[n]`; `NO_CAMERA` where it is not known.
    """

    paths: tuple[Path, ...]
    labels: NDArray[np.int64]
    cameras: NDArray[np.int64]

    def __post_init__(self) -> None:
        assert len(self.paths) == len(self.labels) == len(self.cameras)

    def __len__(self) -> int:
        return len(self.paths)

    def pick(self, which: NDArray[np.bool_] | NDArray[np.int64]) -> "ImageList":
        """Some of these images, by mask or by number."""
        numbers = np.arange(len(self))[which]
        return ImageList(tuple(self.paths[i] for i in numbers), self.labels[numbers], self.cameras[numbers])


@dataclass(frozen=True)
class DataSet:
    """Training images, and the images that training is judged by.

    Attributes:
        train: labels are positions in `classes`.
        classes: names of the training classes; a class's position is its id everywhere.
        query, gallery: labels are positions in `validation_classes`. An image may be in both; it never
            matches itself.
        validation_classes: names of the classes of queries and gallery.
        digest: of the training images' names, sizes and classes; tells whether they have been replaced.
    """

    train: ImageList
    classes: tuple[str, ...]
    query: ImageList
    gallery: ImageList
    validation_classes: tuple[str, ...]
    digest: str = ""

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise ValueError(f"the training split has {len(self.classes)} classes; at least 2 are needed")

    def summary(self) -> str:
        """One line for people."""
        unseen = len(set(self.validation_classes) - set(self.classes))
        return (
            f"{len(self.train):,} training images of {len(self.classes):,} classes; "
            f"{len(self.query):,} queries, {len(self.gallery):,} gallery images of "
            f"{len(self.validation_classes):,} classes, {unseen:,} of them not in training"
        )


def number_names(names: Sequence[str]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Each name's position among the sorted distinct names, and those."""
    distinct = tuple(sorted(set(names)))
    position = {name: i for i, name in enumerate(distinct)}
    return np.array([position[name] for name in names], dtype=np.int64), distinct


def number_cameras(names: Sequence[str]) -> NDArray[np.int64]:
    """Cameras as numbers; an empty name is `NO_CAMERA`."""
    position = {name: i for i, name in enumerate(sorted(set(names) - {""}))}
    return np.array([position.get(name, NO_CAMERA) for name in names], dtype=np.int64)
