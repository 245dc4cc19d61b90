"""A model judged on the validation images of a data set, and what raw pixels would achieve there."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from nearkin_trainer.config import ImageConfig
from nearkin_trainer.data import DataSet, ImageSource, open_images, to_floats
from nearkin_trainer.distributed import World
from nearkin_trainer.evaluate import (
    Retrieval,
    Scores,
    cosine_scores,
    euclidean_scores,
    extract,
    identities,
    qaconv_scores,
    retrieve,
)
from nearkin_trainer.model import Model


class Judge:
    """Queries and gallery of one data set.

    Args:
        world: the job; its processes share the work.
        data: whose queries and gallery.
        image: size of the images.
        batch: images at a time.
    """

    def __init__(self, world: World, data: DataSet, image: ImageConfig, batch: int) -> None:
        self._world, self._batch = world, batch
        self._query, self._gallery = identities(data.query, data.gallery)
        # An image may be query and gallery image both: it is read and computed once.
        paths = list(dict.fromkeys((*data.query.paths, *data.gallery.paths)))
        self._images: ImageSource = open_images(
            world, paths, image.height, image.width, memory_bytes=image.memory_bytes
        )

    @property
    def my_queries(self) -> int:
        """How many queries this process judges."""
        mine = self._world.share(len(self._query))
        return int(mine.stop) - int(mine.start)

    def features(
        self, model: Model, progress: Callable[[int], None] = lambda _: None
    ) -> dict[str, Retrieval]:
        """Retrieval by QAConv scores (`qaconv`) and by the cosine of flattened maps (`cosine`).

        Args:
            model: what is judged, in evaluation mode meanwhile.
            progress: told how many of `my_queries` are done, now and then.
        """
        if not len(self._query):
            nothing = Retrieval.of_nothing()
            return {"qaconv": nothing, "cosine": nothing}
        was_training = model.training
        model.eval()
        with torch.no_grad():
            features = extract(self._world, model, self._take, len(self._images), self._batch)
            queries = features[self._query.images]
            gallery = features[self._gallery.images]
            found = {
                "qaconv": self._retrieve(
                    queries, qaconv_scores(model.head, gallery, model.sparse.backend), progress
                ),
                "cosine": self._retrieve(queries, cosine_scores(gallery)),
            }
        model.train(was_training)
        return found

    def pixels(self) -> Retrieval:
        """Retrieval by the Euclidean distance of raw pixels."""
        if not len(self._query):
            return Retrieval.of_nothing()
        everything = self._take(np.arange(len(self._images))).flatten(1)
        queries, gallery = everything[self._query.images], everything[self._gallery.images]
        return self._retrieve(queries, euclidean_scores(gallery))

    def _retrieve(
        self, queries: torch.Tensor, scores: Scores, progress: Callable[[int], None] = lambda _: None
    ) -> Retrieval:
        return retrieve(self._world, queries, self._query, self._gallery, scores, progress=progress)

    def _take(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        return to_floats(self._images.take(numbers), self._world.device)
