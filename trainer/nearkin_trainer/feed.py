"""Batches on their way to the network: read ahead in a thread, so that decoding and training overlap."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from nearkin_trainer.data.images import ImageSource

Numbers = NDArray[np.int64]


def read_ahead(
    images: ImageSource, batches: Iterable[Numbers], depth: int = 2
) -> Iterator[tuple[Numbers, torch.Tensor]]:
    """Each batch's image numbers with their pixels, in order, `depth` batches ahead of the reader."""
    waiting: deque[tuple[Numbers, Future[torch.Tensor]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
        try:
            for numbers in batches:
                waiting.append((numbers, thread.submit(images.take, numbers)))
                if len(waiting) > depth:
                    done, pixels = waiting.popleft()
                    yield done, pixels.result()
            while waiting:
                done, pixels = waiting.popleft()
                yield done, pixels.result()
        finally:
            for _, future in waiting:
                future.cancel()
