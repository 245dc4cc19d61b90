"""Which validation images ask and which answer, when the data do not say."""

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nearkin_trainer.data.values import NO_CAMERA, ImageList

logger = logging.getLogger("nearkin.trainer.data")


def choose_queries(
    images: ImageList, is_query: Sequence[bool] | None = None, is_gallery: Sequence[bool] | None = None
) -> tuple[ImageList, ImageList]:
    """Query and gallery images.

    With both flags given for some image each, they decide. With one kind only, all other images are of the
    other kind. With none, one image of each class that has two or more asks, and all others answer.
    """
    query = _mask(is_query, len(images))
    gallery = _mask(is_gallery, len(images))
    if query.any() and not gallery.any():
        logger.info(
            "no validation image is marked is_gallery: the gallery is every image that is not a query"
        )
        gallery = ~query
    elif gallery.any() and not query.any():
        logger.info("no validation image is marked is_query: every image outside the gallery is a query")
        query = ~gallery
    elif not query.any() and len(images):
        query = _one_of_each_class(images)
        gallery = ~query
        logger.info(
            "no validation image is marked is_query or is_gallery: one image of each class is a query "
            "(%d), the others are the gallery (%d)",
            query.sum(),
            gallery.sum(),
        )
    return images.pick(query), images.pick(gallery)


def _mask(flags: Sequence[bool] | None, count: int) -> NDArray[np.bool_]:
    return np.zeros(count, dtype=bool) if flags is None else np.asarray(flags, dtype=bool)


def _one_of_each_class(images: ImageList) -> NDArray[np.bool_]:
    chosen = np.zeros(len(images), dtype=bool)
    order = np.argsort(images.labels, kind="stable")
    starts = np.flatnonzero(np.diff(images.labels[order], prepend=-2))
    for members in np.split(order, starts[1:]):
        if len(members) > 1 and images.labels[members[0]] >= 0:
            chosen[_answerable(images, members)] = True
    return chosen


def _answerable(images: ImageList, members: NDArray[np.int64]) -> int:
    """The first image of a class that another camera has seen too; failing that, the first."""
    cameras = images.cameras[members]
    for member, camera in zip(members, cameras, strict=True):
        if camera == NO_CAMERA or (cameras != camera).any():
            return int(member)
    return int(members[0])
