"""Nearest classes of classes and of vectors. Opened generations are kept ready, within a bound of memory."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearkin_service.engines.contract import Neighbours, Searcher
from nearkin_service.errors import InvalidArgumentError, LimitExceededError
from nearkin_service.operations.core import Core
from nearkin_service.values import EmbeddingsState, Generation

log = logging.getLogger("nearkin.search")

_MAX_ANSWERS = 4 << 20
"""Queries times neighbours of one reply."""


class Searching:
    """Searchers by generation, the most recently used ones kept."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._open: OrderedDict[str, asyncio.Task[Searcher]] = OrderedDict()
        self._trusted: set[str] = set()

    def trust(self, generation: Generation) -> None:
        """Its rows were checked on arrival by this very process: they need not all be read again."""
        self._trusted.add(generation.push_id)

    def forget(self, generation: Generation) -> None:
        """Its embeddings go; searches under way finish."""
        self._open.pop(generation.push_id, None)
        self._trusted.discard(generation.push_id)

    async def nearest_to_classes(
        self, generation: Generation, classes: NDArray[np.int64], k: int
    ) -> Neighbours:
        """InvalidArgumentError: a class or k out of range. Data loss, dropped rows: their errors."""
        total = generation.spec.num_classes
        k = self._checked_k(generation, k, total - 1)
        self.require_few(len(classes), k)
        outside = classes[(classes < 0) | (classes >= total)]
        if len(outside):
            raise InvalidArgumentError("classes.ids", f"class {int(outside[0])} is not within 0..{total - 1}")
        self._core.metrics.queries.inc(len(classes))
        searcher = await self._searcher(generation)
        return await self._core.compute(searcher.nearest_to_classes, classes, k)

    async def nearest_to_vectors(
        self, generation: Generation, vectors_QR: NDArray[Any], k: int
    ) -> Neighbours:
        """InvalidArgumentError: k out of range, or a vector with NaN, Inf or nothing but zeros (named)."""
        k = self._checked_k(generation, k, generation.spec.num_classes)
        self.require_few(len(vectors_QR), k)
        self._core.metrics.queries.inc(len(vectors_QR))
        searcher = await self._searcher(generation)
        try:
            return await self._core.compute(searcher.nearest_to_vectors, vectors_QR, k)
        except ValueError as error:
            raise InvalidArgumentError("vectors.payload", str(error)) from error

    def _checked_k(self, generation: Generation, k: int, most: int) -> int:
        wanted = k or generation.spec.k
        if not 1 <= wanted <= most:
            raise InvalidArgumentError("k", f"{wanted} is not in 1..{most}")
        return wanted

    def require_few(self, count: int, k: int = 1) -> None:
        """LimitExceededError: more queries, or more neighbours, than one call may ask for."""
        limit = self._core.config.limits.max_nearest_queries
        if count > limit:
            raise LimitExceededError(
                "max_nearest_queries", f"{count:,} queries in one call; send at most {limit:,}"
            )
        if count * k > _MAX_ANSWERS:
            raise LimitExceededError(
                "max_nearest_queries",
                f"{count:,} queries with k {k:,}; ask for at most {_MAX_ANSWERS // k:,} at once",
            )

    async def _searcher(self, generation: Generation) -> Searcher:
        """Opened once, however many ask for it at the same time."""
        key = generation.push_id
        task = self._open.get(key)
        if task is None:
            task = self._open[key] = self._core.spawn(self._open_searcher(generation))
        self._open.move_to_end(key)
        try:
            searcher = await asyncio.shield(task)
        except Exception:
            if self._open.get(key) is task:
                del self._open[key]
            raise
        self._evict(keep=key)
        return searcher

    async def _open_searcher(self, generation: Generation) -> Searcher:
        if generation.push_id not in self._trusted:
            generation = await self._verified(generation)
        return await self._core.compute(self._opened, generation)

    def _opened(self, generation: Generation) -> Searcher:
        core, spec = self._core, generation.spec
        with core.catalogue.kept(generation):
            with closing(core.directory.open_rows(generation)) as file:
                rows = file.map()
            absent = core.directory.absent(generation)
        return core.engines.open_searcher(
            rows, spec.row_shape, spec.key, absent, core.device, qaconv=spec.qaconv
        )

    async def _verified(self, generation: Generation) -> Generation:
        """The generation with what its rows turned out to be; read once per process."""
        if not generation.has_embeddings:
            return generation
        state = await self._core.compute(self._core.directory.verify_rows, generation)
        if state is EmbeddingsState.LOST:
            generation = replace(generation, embeddings=state)
            self._core.catalogue.replace(generation)
        else:
            self._trusted.add(generation.push_id)
        return generation

    def _evict(self, keep: str) -> None:
        """Lets the least recently used go until the rest fits."""
        bound = self._core.config.searcher_memory_bytes
        ready = {key: task.result().memory_bytes for key, task in self._open.items() if _succeeded(task)}
        total = sum(ready.values())
        for key, cost in ready.items():
            if total <= bound:
                break
            if key != keep:
                del self._open[key]
                total -= cost


def _succeeded(task: asyncio.Task[Searcher]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
